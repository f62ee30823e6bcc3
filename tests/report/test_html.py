from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from luthier.core.errors import DataError
from luthier.core.run import RunFolder
from luthier.report.html import render, write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Reads a page strictly: tags must balance; keeps ids, references and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "action", "data"):
                self.references.append(value or "")


def test_full_run_shows_every_section(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(render(make_run(tmp_path / "demo")))
    for text in (
        "pretrain · instella-8m",
        "finished",
        "2026-09-21",
        "2.05",
        "[1.98, 2.12]",
        "By source",
        "Bits per byte",
    ):
        assert text in page.text
    for text in (
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "MFU",
        "Samples",
        "Configuration",
        "Environment",
    ):
        assert text in page.text
    assert "luthier pretrain --size nano" in page.text
    assert page.tags["svg"] == 6


def test_page_stands_alone(tmp_path: Path, make_run: MakeRun) -> None:
    text = render(make_run(tmp_path / "demo"))
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert all(reference.startswith("#") for reference in page.references)


def test_ids_are_unique_and_references_resolve(tmp_path: Path, make_run: MakeRun) -> None:
    for name in ("01-pretrain", "02-sft"):
        make_run(tmp_path / "tour" / name)
    text = render(tmp_path / "tour")
    page = Page(text)
    assert max(page.ids.values()) == 1
    pointed_at = {reference.removeprefix("#") for reference in page.references} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert pointed_at == set(page.ids)


def test_what_a_model_wrote_is_text_not_markup(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "<i>name", rows=20)
    run = RunFolder.read(folder)
    run.write_summary(
        {"verb": "<u>", "headline": {"<a>": "<q>"}, "tables": [{"columns": ["<s>"], "rows": [["</td>"]]}]}
    )
    page = Page(render(folder))
    assert (
        page.tags["script"] == page.tags["b"] - 2 == page.tags["i"] == page.tags["u"] == page.tags["q"] == 0
    )  # 2 prompts
    for text in ('<script>alert("1")</script> & <b>', "<a>", "<q>", "<s>", "</td>", "<u>"):
        assert text in page.text


def test_same_folder_same_bytes_and_small(tmp_path: Path, make_run: MakeRun) -> None:
    first = render(make_run(tmp_path / "a" / "demo", rows=2000))
    assert first == render(tmp_path / "a" / "demo")
    assert first == render(make_run(tmp_path / "b" / "demo", rows=2000))
    assert len(first.encode()) < 300_000


def test_interrupted_run_says_where(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(render(make_run(tmp_path / "demo", rows=7, finished=False)))
    assert "interrupted at step 7" in page.text
    assert "No evaluation rows yet." in page.text
    assert "No headline numbers yet" in page.text


def test_running_run_is_told_from_an_interrupted_one(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "demo", {"steps": 3})
    run.log("train", step=1, tokens=10, loss=4.0)
    assert "running, at step 1" in render(tmp_path / "demo")
    run.close()
    assert "interrupted at step 1" in render(tmp_path / "demo")


def test_run_without_metrics(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(render(make_run(tmp_path / "demo", rows=0, finished=False)))
    assert "interrupted before its first row" in page.text
    assert "No training or evaluation rows yet." in page.text
    assert page.tags["svg"] == 0


def test_run_of_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    assert "the machine of this run is not known" in Page(render(tmp_path)).text


def test_recipe_shows_overview_then_stages(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "tour", rows=0, finished=False)
    for name, finished in (("02-sft", False), ("01-pretrain", True)):
        make_run(tmp_path / "tour" / name, finished=finished)
    text = render(tmp_path / "tour")
    page = Page(text)
    assert "tour · recipe of 2 stages" in page.text
    assert "interrupted in 02-sft" in page.text
    assert page.tags["article"] == 2
    assert (
        text.index("<h2>Stages") < text.index('<article id="run-01-pretrain"') < text.index('<article id="run-02-sft"')
    )
    assert {"#run-01-pretrain", "#run-02-sft"} <= set(page.references)


def test_folder_of_runs_is_compared(tmp_path: Path, make_run: MakeRun) -> None:
    for name, rate in (("lr-10", 0.01), ("lr-3", 0.003)):
        make_run(tmp_path / name, learning_rate=rate)
    text = render(tmp_path)
    page = Page(text)
    assert "Settings that differ" in page.text
    assert "optimizer.learning_rate" in page.text
    assert page.tags["svg"] == 4
    assert text.index("lr-3") < text.index("lr-10")


def test_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run") as error:
        render(tmp_path)
    assert "--out" in error.value.hint
    with pytest.raises(DataError, match="no such folder"):
        render(tmp_path / "absent")


def test_write_report_places_the_file(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "demo", rows=3)
    assert write_report(folder) == folder / "report.html"
    assert write_report(folder, tmp_path / "out.html") == tmp_path / "out.html"
    assert (tmp_path / "out.html").read_text() == (folder / "report.html").read_text()


def test_import_is_light() -> None:
    code = "import sys, luthier.report.html; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
