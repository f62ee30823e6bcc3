"""Scoring a likelihood task with a model: a row for each item in the file that all tasks share, nothing scored twice.

The options of several items are in work at once, so that a model in this process reads them in batches; what an
option gets does not depend on its company. Rows are appended when they are done and keyed as those of `runner`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.core.errors import ConfigError, EndpointError
from luthier.core.files import append_jsonl
from luthier.llm.types import Backend, Score
from luthier.tasks.likelihood import Item, LikelihoodTask, Option
from luthier.tasks.likelihood_metrics import PRIMARY, is_right
from luthier.tasks.runner import Row, read_answers


async def score_task(
    task: LikelihoodTask,
    backend: Backend,
    path: Path,
    *,
    method: str = "likelihood",
    unconditional: bool = False,
    identity: str = "",
    at_once: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The rows of all items, in their order; those that are not in the file yet are made and appended.

    unconditional: also score every option after nothing. identity: names the model's weights; rows that were made with
    others are made anew. at_once: items in work at the same time.
    An item that cannot be scored, such as one longer than the model's context, makes a row with the status "failed",
    which says why and is tried again the next time.
    """
    known = read_answers(path)
    rows: dict[str, Row] = {}
    todo = list[Item]()
    for item in task.items:
        row = known.get((task.name, item.id, method, 0))
        if row is not None and _is_current(row, item, identity, unconditional=unconditional):
            rows[item.id] = row
            advance()
        else:
            todo.append(item)
    waiting = iter(sorted(todo, key=_length, reverse=True))  # items of like length share a batch

    async def work() -> None:
        for item in waiting:
            row = {"task": task.name, "problem": item.id, "method": method, "repeat": 0, "model": identity}
            row |= await _scored(task, item, backend, unconditional=unconditional)
            append_jsonl(path, row)
            rows[item.id] = row
            advance()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(todo))):
            group.create_task(work())
    return [rows[item.id] for item in task.items]


def _is_current(row: Row, item: Item, identity: str, *, unconditional: bool) -> bool:
    done = row["status"] != "failed" and (not unconditional or "unconditional" in row)
    return done and row["sha256"] == item.digest and row["model"] == identity


def _length(item: Item) -> int:
    return max(len(option.context) + len(option.text) for option in item.options)


async def _scored(task: LikelihoodTask, item: Item, backend: Backend, *, unconditional: bool) -> Row:
    row: Row = {"sha256": item.digest, "gold": item.label, "options": len(item.options)}
    began = time.perf_counter()
    try:
        scores = await _score_all(item.options, backend)
        alone = await _score_all([Option("", o.text) for o in item.options], backend) if unconditional else []
        if task.kind == "target" and scores[0].greedy is None:
            raise EndpointError(
                f"{backend.model} does not tell which tokens it would write",
                hint="load the model in this process, or serve it with vLLM",
            )
    except (EndpointError, ConfigError) as error:
        return row | {"status": "failed", "how": "model", "error": str(error)}
    row |= {
        "logprobs": [score.logprob for score in scores],
        "tokens": [len(score.tokens) for score in scores],
        "bytes": [option.num_bytes for option in item.options],
        "greedy": [score.greedy for score in scores],
        "prompt_tokens": sum(score.usage.prompt_tokens for score in [*scores, *alone]),
        "calls": sum(score.usage.calls for score in [*scores, *alone]),
        "seconds": round(time.perf_counter() - began, 3),
        "status": "scored",
    }
    if unconditional:
        row["unconditional"] = [score.logprob for score in alone]
    return row | {"status": "correct" if is_right(row, PRIMARY[task.kind]) else "wrong"}


async def _score_all(options: Sequence[Option], backend: Backend) -> list[Score]:
    """A score for each option; equal ones are scored once."""
    different = list(dict.fromkeys(options))
    scores = await asyncio.gather(*(backend.score(option.context, option.text) for option in different))
    found = dict(zip(different, scores, strict=True))
    return [found[option] for option in options]
