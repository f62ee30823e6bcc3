"""Tasks by the names that users give: a puzzle's or a likelihood task's name, a file, or a layout and a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier.core.errors import ConfigError, did_you_mean
from luthier.tasks.likelihood import LikelihoodTask, is_likelihood_file, read_items
from luthier.tasks.math import LAYOUTS, read_problems
from luthier.tasks.puzzles import PUZZLES
from luthier.tasks.task import Task
from luthier.tasks.text_tasks import TEXT_TASKS, open_text_task


def open_task(name: str, *, limit: int = 0) -> Task | LikelihoodTask:
    """The task of that name, its first `limit` problems or items (0: all).

    `cloze`, `word-order` and `last-word` may be followed by a corpus: `cloze:book.txt`. What the rows of a file say
    decides whether its problems are solved or its texts are scored. Raises: ConfigError, DataError.
    """
    start, colon, rest = name.partition(":")
    task: Task | LikelihoodTask
    if name in PUZZLES:
        task = PUZZLES[name]()
    elif start in TEXT_TASKS and bool(colon) == bool(rest):
        task = open_text_task(start, rest)
    elif colon and start in LAYOUTS:
        task = read_problems(Path(rest), start)
    elif Path(name).suffix:
        task = read_items(Path(name)) if is_likelihood_file(Path(name)) else read_problems(Path(name))
    else:
        known = [*PUZZLES, *TEXT_TASKS, *(f"{layout}:FILE" for layout in LAYOUTS)]
        raise ConfigError(
            f"tasks: {name!r} is neither a task nor a file{did_you_mean(name, known)}",
            hint=f"give a .jsonl or .parquet file, or one of {', '.join(known)}",
        )
    if not limit:
        return task
    if isinstance(task, LikelihoodTask):
        return replace(task, items=task.items[:limit])
    return replace(task, problems=task.problems[:limit])
