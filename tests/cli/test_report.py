from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tyro

from luthier.cli.report import ReportConfig, run
from luthier.core.console import Console
from luthier.core.errors import DataError
from luthier.core.run import RunFolder
from luthier.reason.trace import Trace, TraceFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RunFolder.open(tmp_path / "demo", {"steps": 3}).close()
    return tmp_path / "demo"


def test_run_is_positional_and_out_has_a_default(folder: Path) -> None:
    assert tyro.cli(ReportConfig, args=[str(folder)]) == ReportConfig(run=folder, out=None)
    assert tyro.cli(ReportConfig, args=[str(folder), "-o", "x.html"]).out == Path("x.html")


def test_writes_the_report_and_says_where(folder: Path) -> None:
    out = io.StringIO()
    run(ReportConfig(run=folder), Console(out=out))
    assert out.getvalue() == f"report: {folder / 'report.html'}\n"
    assert "<!doctype html>" in (folder / "report.html").read_text()


def test_json_result(folder: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    run(ReportConfig(run=folder, out=tmp_path / "r.html"), Console(out=out, as_json=True))
    assert json.loads(out.getvalue()) == {"report": str(tmp_path / "r.html")}


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(ReportConfig(run=tmp_path / "absent"), Console(out=io.StringIO()))


def test_a_trace_has_its_own_page(tmp_path: Path) -> None:
    trace = Trace("q", (file := TraceFile(tmp_path / "t.jsonl"),))
    with trace.span("problem", "cot", question="2+2?", method="cot", model="m") as top:
        top.data.update(answer="4", stop="done")
    file.close()
    run(ReportConfig(run=tmp_path / "t.jsonl"), Console(out=io.StringIO()))
    assert "2+2?" in (tmp_path / "t.html").read_text()


def test_a_folder_of_traces_has_one_page(tmp_path: Path) -> None:
    for name in ("tasks-cot", "tasks-ssr"):
        trace = Trace("q", (file := TraceFile(tmp_path / "traces" / f"{name}.jsonl"),))
        with trace.span("problem", name, question=f"asked by {name}", method=name, model="m") as top:
            top.data.update(answer="4", stop="done")
        file.close()
    out = io.StringIO()
    run(ReportConfig(run=tmp_path / "traces"), Console(out=out))
    assert out.getvalue() == f"report: {tmp_path / 'traces' / 'report.html'}\n"
    page = (tmp_path / "traces" / "report.html").read_text()
    assert page.index("asked by tasks-cot") < page.index("asked by tasks-ssr")


def test_a_file_that_is_no_trace_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(DataError, match="not an event of a trace") as error:
        run(ReportConfig(run=tmp_path / "notes.txt"), Console(out=io.StringIO()))
    assert "luthier solve --trace" in error.value.hint
