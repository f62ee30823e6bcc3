from __future__ import annotations

import io
import json

import pytest

from luthier.core import console as console_module
from luthier.core.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(*, as_json: bool = False, terminal: bool = False) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    return Console(as_json=as_json, out=out, err=err), out, err


ROWS = [["gzip", 2.5, "—"], ["a longer name", "10.125", "[1, 2]"]]


def test_a_plain_table_is_aligned_numbers_to_the_right() -> None:
    console, out, _ = make()
    console.table("sizes", ["name", "bits", "interval"], ROWS, note="n = 2")
    assert out.getvalue().splitlines() == [
        "sizes",
        "  name             bits  interval",
        "  gzip              2.5  —",
        "  a longer name  10.125  [1, 2]",
        "n = 2",
    ]


def test_a_table_without_rows_has_its_columns() -> None:
    console, out, _ = make()
    console.table("none", ["a", "b"], [])
    assert out.getvalue() == "none\n  a  b\n"


def test_a_terminal_gets_the_same_cells() -> None:
    console, out, _ = make(terminal=True)
    console.table("sizes [b]", ["name", "bits", "interval"], ROWS)
    for cell in ("sizes [b]", "a longer name", "10.125", "[1, 2]"):  # brackets are text, not markup
        assert cell in out.getvalue()


def test_a_narrow_terminal_breaks_names_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console, out, _ = make(terminal=True)
    console.table("methods", ["method", "correct", "tokens"], [["ssr:steps=lines,temperature=1.0", "0.9605", "252.25"]])
    assert "…" not in out.getvalue()
    assert "0.9605  252.25" in out.getvalue()
    assert "=1.0" in out.getvalue()


def test_json_keeps_standard_output_for_one_object() -> None:
    console, out, err = make(as_json=True)
    console.print("text")
    console.table("t", ["a"], [[1]])
    console.status("working")
    console.result({"ä": 1, "none": None})
    assert json.loads(out.getvalue()) == {"ä": 1, "none": None}
    assert len(out.getvalue().splitlines()) == 1
    assert err.getvalue() == "working\n"


def test_without_json_the_result_object_is_silent() -> None:
    console, out, err = make()
    console.result({"a": 1})
    console.print("text")
    console.status("status")
    assert (out.getvalue(), err.getvalue()) == ("text\n", "status\n")


def test_progress_in_a_pipe_is_the_last_line_alone_when_quick() -> None:
    console, out, err = make()
    with console.progress(4, "training") as advance:
        for _ in range(4):
            advance(note="loss 2.1")
    assert err.getvalue() == "training 100%  loss 2.1\n"
    assert out.getvalue() == ""


def test_progress_in_a_pipe_reports_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(float(second) for second in range(6, 1000, 6))])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    console, _, err = make()
    with console.progress(10, "training", done=2) as advance:
        for _ in range(3):
            advance()
    assert err.getvalue().splitlines() == ["training  40%"]


def test_progress_of_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 101.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    console, _, err = make()
    with console.progress(0, "empty") as advance:
        advance()
    assert "empty" in err.getvalue()


def test_progress_on_a_terminal_runs_to_its_end() -> None:
    console, out, err = make(terminal=True)
    with console.progress(2, "training [x]", done=1) as advance:
        advance(note="loss [2]")
    assert "training" in err.getvalue()
    assert out.getvalue() == ""
