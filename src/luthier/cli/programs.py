"""`luthier programs`: new word problems out of given ones, each with a program that calculates its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.cli.models import open_model, read_budget
from luthier.core.config import digest, to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, EndpointError
from luthier.core.files import atomic_write
from luthier.core.run import RunFolder
from luthier.data.contamination import RunIndex
from luthier.llm.budget import BudgetedBackend
from luthier.llm.cache import CachedBackend
from luthier.llm.prices import Prices
from luthier.llm.types import Usage
from luthier.tasks.catalog import open_task
from luthier.tasks.task import Problem, Task
from luthier.train.program_config import ProgramsConfig
from luthier.train.program_records import Outcome, Rows, collect, gate_rows, growth, reason_rows
from luthier.train.programs import ProgramMaker, make_all
from luthier.train.sandbox import Sandbox


def dry_run(config: ProgramsConfig, console: Console) -> None:
    """Print how many calls there are at most."""
    count = len(_open(config.problems, config.limit).problems)
    most = {"problems": count, "most calls for one": config.most_calls(), "most calls": count * config.most_calls()}
    console.table("programs", ("quantity", "value"), [(name, f"{value:,}") for name, value in most.items()])
    console.result(most)


def run(config: ProgramsConfig, console: Console) -> None:
    """Make the problems, or go on with them, and write all that there is."""
    limits = _limits(config)
    problems = _open(config.problems, config.limit).problems
    tests = [_open(name) for name in config.keep_out]
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=config.MAY_CHANGE)) as folder:
        outcomes, paid = asyncio.run(_make(config, limits, problems, tests, folder.path, console))
        rows = collect(outcomes)
        for name, some in zip(("accepted", "text", "rejected"), rows, strict=True):
            _write(folder.path / f"{name}.jsonl", some)
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        _summarize(config, folder, outcomes, rows, paid, console)
        if failures:
            console.status(f"{len(failures)} of {len(outcomes)} problems are not finished: {failures[0]}")
        if len(failures) == len(outcomes) and not rows.accepted:
            raise EndpointError(failures[0], hint="run the same command again to go on")


def _open(name: str, limit: int = 0) -> Task:
    """The problems of that name. Raises: ConfigError for a task without problems, such as one of texts to score."""
    task = open_task(name, limit=limit)
    if not isinstance(task, Task):
        raise ConfigError(f"{name!r} has no problems with answers", hint="give a file with prompt and answer")
    return task


def _limits(config: ProgramsConfig) -> dict[str, Any]:
    """The budget as arguments of BudgetedBackend. Raises: ConfigError."""
    limits = read_budget(config.budget)
    if "max_seconds" in limits:
        raise ConfigError("budget: seconds are no limit here", hint="use calls, tokens or dollars")
    if "max_cost" in limits and config.prices is None:
        raise ConfigError("budget: dollars need prices", hint="add --prices FILE, or limit tokens instead")
    if "max_tokens_total" in limits:
        limits["max_tokens"] = limits.pop("max_tokens_total")
    price = Prices.read(config.prices).cost if config.prices else None
    return {**limits, "price": price}


async def _make(
    config: ProgramsConfig,
    limits: Mapping[str, Any],
    problems: Sequence[Problem],
    tests: Sequence[Task],
    path: Path,
    console: Console,
) -> tuple[list[Outcome], Usage]:
    """The outcomes, and what the replies of all runs in this folder have cost."""
    inner = open_model(config.model, endpoint=config.endpoint, device=config.device)
    try:
        budget = BudgetedBackend(inner, **limits)
        backend = CachedBackend(budget, path / "replies.sqlite")
    except BaseException:
        await inner.aclose()
        raise
    try:
        budget.spent = _paid_before(backend, limits)
        sandbox = Sandbox(seconds=config.deadline, memory=config.memory, workers=os.cpu_count() or 1)
        maker = ProgramMaker(backend, sandbox, config, problems, kept_out=_kept_out(tests, config.overlap))
        with console.progress(len(problems), "problems") as advance:
            outcomes = await make_all(
                maker,
                problems,
                path / "problems.jsonl",
                identity=digest([test.sha256 for test in tests]),
                at_once=config.at_once,
                advance=lambda: advance(1),
            )
        return outcomes, backend.stored()
    finally:
        await backend.aclose()


def _paid_before(backend: CachedBackend, limits: Mapping[str, Any]) -> Usage:
    paid = backend.stored()
    if paid.unreported and {"max_tokens", "max_cost"} & set(limits):
        raise ConfigError(
            "the server did not tell how many tokens earlier replies had, so this budget cannot be kept",
            hint="limit calls instead: --budget calls=NUMBER",
        )
    return paid


def _kept_out(tests: Sequence[Task], overlap: int) -> Callable[[str], str]:
    """Says which test row a text gives away, if any."""
    index = RunIndex({test.name: [problem.prompt for problem in test.problems] for test in tests}, overlap)

    def reason(text: str) -> str:
        hits = sorted(index.find(text)[0])
        return f"kept out: {hits[0][0]} row {hits[0][1] + 1}" if hits else ""

    return reason


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _summarize(
    config: ProgramsConfig, folder: RunFolder, outcomes: list[Outcome], rows: Rows, paid: Usage, console: Console
) -> None:
    grown = growth(outcomes)
    gates: dict[str, Any] = {
        "title": f"{config.problems}: {len(outcomes)} problems, {config.model}, seed {config.seed}",
        "columns": ["gate", "in", "passed", "share", "what passes"],
        "rows": gate_rows(outcomes),
        "note": "The first three count given problems, the others new ones.",
    }
    reasons: dict[str, Any] = {
        "title": "why something was rejected",
        "columns": ["gate", "reason", "count"],
        "rows": reason_rows(rows.rejected),
        "note": "Of a problem without a program, the last reason.",
    }
    headline = {
        "accepted": f"{len(rows.accepted):,} from {sum(bool(o.accepted) for o in outcomes):,} problems",
        "unfinished": f"{sum(bool(o.failure) for o in outcomes):,} problems",
        "paid": f"{paid.calls:,} calls, {paid.prompt_tokens:,} + {paid.completion_tokens:,} tokens",
        "values grew": "-" if grown is None else f"× {grown:.2f} (geometric mean)",
    }
    for table in (gates, reasons):
        console.table(**table)
    for name, value in headline.items():
        console.print(f"{name}: {value}")
    folder.write_summary({"verb": "programs", "headline": headline, "tables": [gates, reasons]})
    console.result(
        {
            "accepted": len(rows.accepted),
            "rejected": len(rows.rejected),
            "unfinished": sum(bool(o.failure) for o in outcomes),
            "gates": {row[0]: row[1:3] for row in gates["rows"]},
            "calls": paid.calls,
            "prompt_tokens": paid.prompt_tokens,
            "completion_tokens": paid.completion_tokens,
            "growth": grown,
        }
    )
