from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.run import RunFolder
from luthier.report.record import read
from luthier.report.sections import SAMPLE_CHARACTERS, SAMPLE_STEPS, headline, losses, other_measurements, samples

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "main", "rest"),
    [("2.05 [1.98, 2.12]", "2.05", "[1.98, 2.12]"), ("196.6 M", "196.6", "M"), ("71 % ± 2 %", "71", "% ± 2 %")],
)
def test_headline_sets_value_apart_from_unit_and_interval(
    tmp_path: Path, make_run: MakeRun, value: str, main: str, rest: str
) -> None:
    folder = make_run(tmp_path / "demo", rows=0)
    RunFolder.read(folder).write_summary({"headline": {"x": value}})
    assert f"<dd>{main}<small> {rest}</small></dd>" in headline(read(folder))


def test_latest_samples_come_first_and_alone_open(tmp_path: Path, make_run: MakeRun) -> None:
    text = samples(read(make_run(tmp_path / "demo", rows=30)))
    assert text.index("Step 30") < text.index("Step 20") < text.index("Step 10")
    assert text.count("<details open>") == 1
    assert text.index("<details open>") < text.index("Step 30")


def test_left_out_samples_are_counted(tmp_path: Path, make_run: MakeRun) -> None:
    run = RunFolder.read(make_run(tmp_path / "demo", rows=0))
    for step in range(SAMPLE_STEPS + 3):
        run.write_sample(step, [{"prompt": "", "text": "x" * (SAMPLE_CHARACTERS + 1234)}])
    text = samples(read(run.path))
    assert "Texts of 3 earlier steps" in text
    assert "1,234 more characters" in text


def test_rows_that_are_not_finite_are_reported(tmp_path: Path, make_run: MakeRun) -> None:
    run = RunFolder.read(make_run(tmp_path / "demo", rows=9))
    run.log("train", step=10, tokens=50_000, loss=float("nan"))
    assert "1 row is not finite" in losses(read(run.path))


def test_every_other_number_gets_a_figure(tmp_path: Path, make_run: MakeRun) -> None:
    run = RunFolder.read(make_run(tmp_path / "demo", rows=0))
    for step in (1, 2):
        run.log("train", step=step, loss=1.0, **{"rewards/margins": step / 2})
        run.log("probe", step=step, accuracy=step / 4)
    text = other_measurements(read(run.path))
    assert "rewards/margins" in text
    assert "accuracy (probe)" in text
    assert text.count("<svg") == 2


def test_a_number_that_never_changed_is_stated_and_not_drawn(tmp_path: Path, make_run: MakeRun) -> None:
    run = RunFolder.read(make_run(tmp_path / "demo", rows=0))
    for step in (1, 2):
        run.log("eval", step=step, bits_per_byte=2.0, bytes=4000)
    text = other_measurements(read(run.path))
    assert "bytes (eval) 4,000" in text
    assert "<svg" not in text
