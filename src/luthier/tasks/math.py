"""Readers of mathematics problems: GSM8K, MATH, AIME, and plain rows with `prompt` and `answer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.data.files import missing_path
from luthier.data.formats import READERS, check_row
from luthier.tasks.answers import extract_answer
from luthier.tasks.task import Problem, Task

Reader = Callable[[Mapping[str, Any], str], Problem]
KINDS = ("math", "exact", "sudoku", "choice")


def read_problems(path: Path, layout: str = "rows") -> Task:
    """The problems of a `.jsonl` or `.parquet` file in one of the layouts of `LAYOUTS`.

    Raises: DataError naming file and row for what does not fit.
    """
    if not path.exists():
        raise missing_path(path)
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: problems are read from {' or '.join(READERS)}, got {path.suffix or 'no suffix'}",
            hint="unpack the file, or write one JSON object per line to a .jsonl file",
        )
    problems = [LAYOUTS[layout](row, f"{path} row {number}") for number, row in READERS[path.suffix](path)]
    if not problems:
        raise DataError(f"{path}: no rows", hint="one JSON object per line is expected")
    if len({problem.id for problem in problems}) < len(problems):
        raise DataError(f"{path}: two rows have the same id", hint="give every row an id of its own, or none")
    return Task(path.stem, problems)


def row_problem(row: Mapping[str, Any], where: str) -> Problem:
    """A row of kind answer: prompt, answer; optionally id, kind (of comparison) and metadata."""
    checked = check_row(row, "answer", where)
    kind, metadata = checked.get("kind", "math"), checked.get("metadata") or {}
    if kind not in KINDS:
        raise DataError(f"{where}: kind is {kind!r}, expected one of {', '.join(KINDS)}", hint="leave it out for math")
    if not isinstance(checked["prompt"], str) or not isinstance(metadata, Mapping):
        raise DataError(f"{where}: prompt must be a string and metadata an object", hint="see docs/formats.md")
    return Problem(
        id=str(checked.get("id", where.rsplit(" ", 1)[1])),
        prompt=checked["prompt"],
        answer=checked["answer"],
        kind=kind,
        metadata=metadata,
    )


def _gsm8k(row: Mapping[str, Any], where: str) -> Problem:
    """question; answer ending in #### and the result."""
    text = _text(row, "answer", where)
    return Problem(
        id=where.rsplit(" ", 1)[1],
        prompt=_text(row, "question", where),
        answer=_gold(text.rpartition("####")[2].strip() if "####" in text else "", where, "#### RESULT"),
    )


def _math(row: Mapping[str, Any], where: str) -> Problem:
    r"""problem; solution with the result in \boxed, or answer; level and type (or subject) become metadata."""
    gold = str(row["answer"]) if "answer" in row else extract_answer(_text(row, "solution", where)) or ""
    metadata = {
        "level": str(row.get("level", "")).removeprefix("Level "),
        "subject": row.get("type", row.get("subject", "")),
    }
    return Problem(
        id=str(row.get("unique_id", where.rsplit(" ", 1)[1])),
        prompt=_text(row, "problem", where),
        answer=_gold(gold, where, "\\boxed{RESULT}"),
        metadata=metadata,
    )


def _aime(row: Mapping[str, Any], where: str) -> Problem:
    """Problem or problem; Answer or answer, an integer."""
    lower = {key.lower(): value for key, value in row.items()}
    return Problem(
        id=str(lower.get("id", where.rsplit(" ", 1)[1])),
        prompt=_text(lower, "problem", where),
        answer=_gold(str(lower.get("answer", "")), where, "an answer"),
    )


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no text in field {field!r}, got {', '.join(map(str, row))}", hint="is it this kind?")
    return value


def _gold(answer: str, where: str, expected: str) -> str:
    if not answer.strip():
        raise DataError(f"{where}: no right answer found, expected {expected}", hint="repair or remove the row")
    return answer.strip()


LAYOUTS: dict[str, Reader] = {"rows": row_problem, "gsm8k": _gsm8k, "math": _math, "aime": _aime}
