"""The table at the end of a recipe: every evaluation, and its difference to the one before it on the same problems."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.cli.run_summary import differences, evaluations
from luthier.core.files import write_json, write_jsonl

METHOD = "cot:temperature=0.0"


def stage(folder: Path, right: list[list[bool]], against: Path | None = None, method: str = METHOD) -> Any:
    """A finished evaluation: `right` holds the attempts at each problem."""
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    rows = [
        {"task": "sums", "problem": str(number), "method": method, "repeat": repeat, "sha256": "x", "status": status}
        for number, attempts in enumerate(right)
        for repeat, status in enumerate("correct" if good else "failed" for good in attempts)
    ]
    write_jsonl(folder / "answers.jsonl", rows)
    write_json(folder / "summary.json", {"headline": {f"sums, {method}": "0.5 [0.1, 0.9]"}})
    return SimpleNamespace(name=folder.name, verb="eval", folder=folder, config=SimpleNamespace(against=against))


def test_each_evaluation_stands_beside_the_one_that_it_is_against(tmp_path: Path) -> None:
    first = stage(tmp_path / "before", [[False], [False], [True], [False]])
    second = stage(tmp_path / "after", [[True], [True], [True], [True]], against=first.folder)
    other = SimpleNamespace(name="pretrain", verb="pretrain", folder=tmp_path, config=None)
    table = evaluations([other, first, second])
    assert table is not None
    plain, compared = table["rows"]
    assert plain == ["before", "sums, cot", "—", "0.5 [0.1, 0.9]", "—", "—"]
    assert compared[:5] == ["after", "sums, cot", "4", "0.5 [0.1, 0.9]", "before"]
    assert compared[5].startswith("+0.750 [+0.250, +1.000]")


def test_one_evaluation_makes_no_table(tmp_path: Path) -> None:
    assert evaluations([stage(tmp_path / "alone", [[True]])]) is None


def test_of_a_problem_that_was_repeated_the_mean_counts(tmp_path: Path) -> None:
    ours = stage(tmp_path / "ours", [[True, True], [True, False]])
    theirs = stage(tmp_path / "theirs", [[False, True], [False, False]])
    (found,) = differences(ours.folder, theirs.folder).values()
    assert (found.value, found.n) == (pytest.approx(0.5), 2)


def test_only_answers_to_the_same_wording_and_method_are_pairs(tmp_path: Path) -> None:
    ours, theirs = stage(tmp_path / "ours", [[True]]), stage(tmp_path / "theirs", [[True]], method="cot")
    assert differences(ours.folder, theirs.folder) == {}


def test_methods_keep_the_settings_that_tell_them_apart(tmp_path: Path) -> None:
    first, second = stage(tmp_path / "first", [[True]]), stage(tmp_path / "second", [[True]])
    methods = ["cot:p=1,t=0", "maj@3:p=1,t=0", "ssr:steps=lines,p=1,t=0", "ssr:p=1,t=0,rounds=2"]
    headline = {f"a:b, {method}": "0.1" for method in methods}
    write_json(second.folder / "summary.json", {"headline": headline})
    table = evaluations([first, second])
    assert table is not None
    told = ["cot", "maj@3", "ssr:steps=lines", "ssr:rounds=2"]
    assert [row[1] for row in table["rows"]] == ["sums, cot", *(f"a:b, {method}" for method in told)]
