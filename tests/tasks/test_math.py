from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.tasks.catalog import open_task
from luthier.tasks.math import read_problems


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("layout", "row", "prompt", "answer"),
    [
        ("gsm8k", {"question": "Q?", "answer": "First 1.\nThen <<1+1=2>>2.\n#### 1,234"}, "Q?", "1,234"),
        ("math", {"problem": "P", "solution": r"so \boxed{\frac{1}{2}}.", "level": "Level 5"}, "P", r"\frac{1}{2}"),
        ("aime", {"ID": "2024-I-1", "Problem": "P", "Answer": 204}, "P", "204"),
        ("rows", {"prompt": "P", "answer": "5", "metadata": {"length": 3}}, "P", "5"),
    ],
)
def test_layouts(tmp_path: Path, layout: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    (problem,) = read_problems(write(tmp_path / "t.jsonl", row), layout).problems
    assert (problem.prompt, problem.answer) == (prompt, answer)


def test_metadata_is_kept(tmp_path: Path) -> None:
    (problem,) = read_problems(
        write(tmp_path / "t.jsonl", {"problem": "P", "answer": "1", "level": "Level 5"}), "math"
    ).problems
    assert problem.metadata["level"] == "5"


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("gsm8k", {"question": "Q?", "answer": "no result"}, "row 1: no right answer"),
        ("math", {"solution": r"\boxed{1}"}, "row 1: no text in field 'problem'"),
        ("rows", {"prompt": "P"}, "row 1"),
        ("rows", {"prompt": "P", "answer": "1", "kind": "essay"}, "kind is 'essay'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, layout: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_problems(write(tmp_path / "t.jsonl", row), layout)


def test_ids_must_differ(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "P", "answer": "1"}
    with pytest.raises(DataError, match="same id"):
        read_problems(write(tmp_path / "t.jsonl", row, row))


def test_tasks_have_names(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *({"question": str(i), "answer": f"#### {i}"} for i in range(5)))
    assert [problem.answer for problem in open_task(f"gsm8k:{path}", limit=2).problems] == ["0", "1"]
    with pytest.raises(ConfigError, match="did you mean 'mini-sudoku'"):
        open_task("mini-sudoko")
    with pytest.raises(DataError, match="none"):
        open_task("none.jsonl")
