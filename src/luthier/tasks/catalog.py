"""Tasks by the names that users give: a puzzle's name, a file, or a layout and a file (`gsm8k:test.jsonl`)."""

from __future__ import annotations

from pathlib import Path

from luthier.core.errors import ConfigError, did_you_mean
from luthier.tasks.math import LAYOUTS, read_problems
from luthier.tasks.puzzles import PUZZLES
from luthier.tasks.task import Task


def open_task(name: str, *, limit: int = 0) -> Task:
    """The task of that name, its first `limit` problems (0: all). Raises: ConfigError, DataError."""
    layout, colon, path = name.partition(":")
    if name in PUZZLES:
        task = PUZZLES[name]()
    elif colon and layout in LAYOUTS:
        task = read_problems(Path(path), layout)
    elif Path(name).suffix:
        task = read_problems(Path(name))
    else:
        known = [*PUZZLES, *(f"{layout}:FILE" for layout in LAYOUTS)]
        raise ConfigError(
            f"tasks: {name!r} is neither a task nor a file{did_you_mean(name, known)}",
            hint=f"give a .jsonl or .parquet file, or one of {', '.join(known)}",
        )
    return Task(task.name, task.problems[:limit]) if limit else task
