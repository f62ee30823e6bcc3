"""Solving a task with a method: many problems at once, a row each, and nothing paid or graded twice.

Rows are appended to one file and keyed by task, problem, method and repeat, so a stopped run goes on where it was. A
model that fails makes a row with the status "failed", which is tried again the next time and never graded. Solving
sees the prompt only; grading comes after and apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from luthier.core.errors import ConfigError, EndpointError
from luthier.core.files import append_jsonl, read_jsonl
from luthier.core.seeds import derive_seed
from luthier.llm.types import Usage
from luthier.tasks.grading import Grader
from luthier.tasks.task import Problem, Task

Row = dict[str, Any]
Key = tuple[str, str, str, int]


class Attempt(Protocol):
    """What a solver returns, as far as it is recorded; `rounds` are successive solutions with their answers."""

    @property
    def answer(self) -> str | None: ...
    @property
    def text(self) -> str: ...
    @property
    def rounds(self) -> Sequence[Any]: ...
    @property
    def stop(self) -> str: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def cost(self) -> float | None: ...
    @property
    def flags(self) -> Sequence[str]: ...
    @property
    def seconds(self) -> float: ...


Solver = Callable[[str, int, str], Awaitable[Attempt]]
"""(prompt, seed, name of the trace) -> attempt."""


def read_answers(path: Path) -> dict[Key, Row]:
    """The rows of a file of answers, the last of each key."""
    return {_key(row): row for row in read_jsonl(path)}


def _key(row: Mapping[str, Any]) -> Key:
    return row["task"], row["problem"], row["method"], row["repeat"]


async def run_task(
    task: Task,
    solve: Solver,
    grader: Grader,
    path: Path,
    *,
    method: str,
    model: str = "",
    repeats: int = 1,
    at_once: int = 16,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """All rows of a task and method, in the order of problems and repeats; those not in `path` are made and appended.

    `model`: names the model's weights; rows that were made with others are made anew. `at_once`: problems in work at
    the same time. Cancelling keeps what is done.
    """
    known = {key: row for key, row in read_answers(path).items() if row["status"] != "failed"}
    wanted = [(problem, repeat) for problem in task.problems for repeat in range(repeats)]
    rows: dict[Key, Row] = {}
    todo: list[tuple[Problem, int]] = []
    for problem, repeat in wanted:
        key = (task.name, problem.id, method, repeat)
        if key in known and (known[key]["sha256"], known[key].get("model")) == (task_digest(problem), model):
            rows[key] = known[key]
            advance()
        else:
            todo.append((problem, repeat))
    waiting = iter(todo)

    async def work() -> None:
        for problem, repeat in waiting:
            row = await _attempt(task.name, problem, repeat, method, solve, grader, seed) | {"model": model}
            append_jsonl(path, row)
            rows[_key(row)] = row
            advance()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(todo))):
            group.create_task(work())
    return [rows[task.name, problem.id, method, repeat] for problem, repeat in wanted]


def task_digest(problem: Problem) -> str:
    """The hash of one problem: a row made for another wording is not reused."""
    return Task("", [problem]).sha256[:16]


async def _attempt(
    task: str, problem: Problem, repeat: int, method: str, solve: Solver, grader: Grader, seed: int
) -> Row:
    row: Row = {"task": task, "problem": problem.id, "method": method, "repeat": repeat}
    row |= {"sha256": task_digest(problem), "gold": problem.answer}
    try:
        # Methods share their seeds, so that they start from the same first chain.
        attempt = await solve(problem.prompt, derive_seed(seed, task, problem.id, repeat), f"{task}/{problem.id}")
    except (EndpointError, ConfigError) as error:  # the latter: a prompt longer than the model's context
        return row | {"status": "failed", "how": "model", "error": str(error)}
    return row | _recorded(attempt) | await _graded(attempt, problem, grader)


def _recorded(attempt: Attempt) -> Row:
    return {
        "answer": attempt.answer,
        "stop": attempt.stop,
        "flags": list(attempt.flags),
        "solutions": len(attempt.rounds),
        "calls": attempt.usage.calls,
        "prompt_tokens": attempt.usage.prompt_tokens,
        "completion_tokens": attempt.usage.completion_tokens,
        "cost": attempt.cost,
        "seconds": round(attempt.seconds, 3),
        "text": attempt.text,
    }


async def _graded(attempt: Attempt, problem: Problem, grader: Grader) -> Row:
    grade = await grader.grade(attempt.answer, problem)
    first = await grader.grade(attempt.rounds[0].answer, problem) if attempt.rounds else grade
    return {"status": grade.status, "how": grade.how, "first_status": first.status}
