"""`luthier eval --tasks`: problems solved by each method, texts scored, and whether a difference may be chance."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.cli import eval_likelihood
from luthier.cli.eval_view import mean, overall, solved_numbers, solved_tables
from luthier.cli.models import identity, open_model, open_role
from luthier.core.config import to_mapping
from luthier.core.console import Advance, Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.run import RunFolder
from luthier.core.stats import Interval, mcnemar
from luthier.llm.cache import CachedBackend
from luthier.llm.prices import Prices
from luthier.llm.types import Backend
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.trace import Trace, TraceFile
from luthier.tasks.catalog import open_task
from luthier.tasks.grading import Grader
from luthier.tasks.likelihood import LikelihoodTask
from luthier.tasks.metrics import majority_at_k
from luthier.tasks.runner import Row, read_answers, run_task
from luthier.tasks.task import Task

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig

MAY_CHANGE = (
    *("out", "device", "method", "tasks", "equal_to", "limit", "by", "at_once", "traces", "repeats", "endpoint"),
    *("shots", "shots_from", "unconditional", "against"),
)
Rows = dict[str, dict[str, list[Row]]]  # by task and method
Votes = dict[str, dict[str, Interval]]


def run(config: EvalConfig, console: Console) -> None:
    """Measure every task; rows, replies and tables stay in the run folder."""
    tasks = _open_tasks(config)
    for method in [*config.method, *filter(None, [config.equal_to])]:
        parse_method(method)
    assert config.out is not None
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        rows, votes = asyncio.run(_measure(config, tasks, folder, console))
        tables = [table for task in tasks for table in _tables(task, rows[task.name], votes, config)]
        if config.against is not None:
            tables.append(_against(config, rows))
        for table in tables:
            console.table(**table)
        for note in _failures(rows):
            console.status(note)
        headline = {f"{t.name}, {m}": _headline(t, r) for t in tasks for m, r in rows[t.name].items()}
        folder.write_summary({"verb": "eval", "headline": headline, "tables": tables})
        console.result({"tasks": {task.name: _numbers(task, rows[task.name], votes) for task in tasks}})


def _open_tasks(config: EvalConfig) -> list[Task | LikelihoodTask]:
    tasks: list[Task | LikelihoodTask] = []
    for name in dict.fromkeys(config.tasks):
        task = open_task(name, limit=config.limit)
        if task.name in [other.name for other in tasks]:
            raise ConfigError(f"tasks: two are called {task.name!r}", hint="rename a file, or give each its own --out")
        tasks.append(eval_likelihood.with_examples(task, config) if isinstance(task, LikelihoodTask) else task)
    if config.shots and not any(isinstance(task, LikelihoodTask) for task in tasks):
        raise ConfigError("shots: no task takes examples", hint="they are for tasks with a context, such as cloze")
    return tasks


async def _measure(
    config: EvalConfig, tasks: Sequence[Task | LikelihoodTask], folder: RunFolder, console: Console
) -> tuple[Rows, Votes]:
    inner = open_model(config.model, endpoint=config.endpoint, device=config.device)
    name = identity(config.model, endpoint=config.endpoint)
    try:
        rows: Rows = {
            task.name: await eval_likelihood.score(config, task, inner, name, folder, console)
            for task in tasks
            if isinstance(task, LikelihoodTask)
        }
        problems = [task for task in tasks if isinstance(task, Task)]
        solved, votes = await _solve_all(config, problems, inner, name, folder, console) if problems else ({}, {})
    finally:
        await inner.aclose()
    return rows | solved, votes


async def _solve_all(
    config: EvalConfig, tasks: Sequence[Task], inner: Backend, name: str, folder: RunFolder, console: Console
) -> tuple[Rows, Votes]:
    cache = folder.path / "replies.sqlite"
    roles = dict(open_role(text) for text in config.role)
    backends = [CachedBackend(inner, cache, identity=name), *(CachedBackend(role, cache) for role in roles.values())]
    price = Prices.read(config.prices).cost if config.prices else None
    models = Models(backends[0], dict(zip(roles, backends[1:], strict=True)), price)
    found: Rows = {}
    votes: Votes = {}
    try:
        async with Grader() as grader:
            for task in tasks:
                solver = _Solving(config, task, folder, models, name, grader, console)
                found[task.name] = {method: await solver.rows(method) for method in dict.fromkeys(config.method)}
                if config.equal_to:
                    vote = await solver.equal_vote()
                    found[task.name][vote] = await solver.rows(vote)
                votes[task.name] = {m: await solver.vote(rows) for m, rows in found[task.name].items()}
    finally:
        for backend in backends:
            await backend.aclose()
    return found, votes


class _Solving:
    """One task with the models, the grader and the place for its rows."""

    def __init__(
        self,
        config: EvalConfig,
        task: Task,
        folder: RunFolder,
        models: Models,
        name: str,
        grader: Grader,
        console: Console,
    ) -> None:
        self.config, self.task, self.folder = config, task, folder
        self.models, self.name, self.grader, self.console = models, name, grader, console

    async def rows(self, method: str) -> list[Row]:
        settings = parse_method(method)
        total = len(self.task.problems) * self.config.repeats
        with self._traces(method) as trace_file, self.console.progress(total, f"{self.task.name}, {method}") as advance:

            async def solver(prompt: str, seed: int, name: str) -> Solution:
                trace = Trace(name, (trace_file,) if trace_file else ())
                return await solve(
                    prompt, self.models, settings, equivalence=self.grader.equivalent, trace=trace, seed=seed
                )

            return await run_task(
                self.task,
                solver,
                self.grader,
                self.folder.path / "answers.jsonl",
                method=method,
                model=self.name,
                repeats=self.config.repeats,
                at_once=self.config.at_once,
                seed=self.config.seed,
                advance=_one(advance),
            )

    async def equal_vote(self) -> str:
        """The majority vote that generates as many tokens for a problem as the method `equal_to` does."""
        reference, single = await self.rows(self.config.equal_to), await self.rows(_like(self.config.equal_to, "cot"))
        k = max(1, round(mean(reference, "completion_tokens") / max(mean(single, "completion_tokens"), 1)))
        return _like(self.config.equal_to, f"maj@{k}")

    async def vote(self, rows: Sequence[Row]) -> Interval:
        """Accuracy of the most common answer of all repeats."""
        answers: dict[str, list[str | None]] = {problem.id: [] for problem in self.task.problems}
        for row in rows:
            answers[row["problem"]].append(row.get("answer"))
        return await majority_at_k(list(answers.values()), self.task.problems, self.grader, k=self.config.repeats)

    @contextlib.contextmanager
    def _traces(self, method: str) -> Iterator[TraceFile | None]:
        if not self.config.traces:
            yield None
            return
        name = "".join(c if c.isalnum() or c in "-@=." else "_" for c in method)
        with contextlib.closing(TraceFile(self.folder.path / "traces" / f"{self.task.name}-{name}.jsonl")) as file:
            yield file


def _like(reference: str, method: str) -> str:
    """A method that asks in the same words and at the same temperature as the reference."""
    settings, usual = parse_method(reference), parse_method(method)
    names = ("prompts", "temperature", "top_p", "max_tokens")
    changed = [f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(usual, n)]
    return f"{method}:{','.join(changed)}" if changed else method


def _one(advance: Advance) -> Any:
    return lambda: advance(1)


def _tables(
    task: Task | LikelihoodTask, by_method: Mapping[str, list[Row]], votes: Votes, config: EvalConfig
) -> Iterator[dict[str, Any]]:
    if isinstance(task, LikelihoodTask):
        return eval_likelihood.tables(task, by_method, config)
    return solved_tables(task, by_method, votes[task.name], config)


def _numbers(task: Task | LikelihoodTask, by_method: Mapping[str, list[Row]], votes: Votes) -> dict[str, Any]:
    if isinstance(task, LikelihoodTask):
        return eval_likelihood.numbers(task, by_method)
    return solved_numbers(by_method, votes[task.name])


def _headline(task: Task | LikelihoodTask, rows: Sequence[Row]) -> str:
    return eval_likelihood.headline(task, rows) if isinstance(task, LikelihoodTask) else overall(rows).text()


def _failures(rows: Mapping[str, Mapping[str, list[Row]]]) -> Iterator[str]:
    """How many problems of each task and method failed, and the first reason."""
    for task, by_method in rows.items():
        for method, some in by_method.items():
            if failed := [row for row in some if row["status"] == "failed"]:
                yield f"{task}, {method}: {len(failed)} failed, the first with: {failed[0]['error']}"


def _against(config: EvalConfig, rows: Rows) -> dict[str, Any]:
    """This model beside that of an earlier run, on what both were asked. Raises: DataError where that is nothing."""
    assert config.against is not None
    earlier = RunFolder.read(config.against)
    theirs, lines = read_answers(earlier.path / "answers.jsonl"), list[list[str]]()
    for task, by_method in rows.items():
        for method, ours in by_method.items():
            first = [(row, theirs.get((task, row["problem"], method, 0))) for row in ours if row["repeat"] == 0]
            both = [(row, other) for row, other in first if other is not None and other["sha256"] == row["sha256"]]
            if both:
                lines.append([task, method, *_beside(both)])
    if not lines:
        raise DataError(f"{config.against}: no answers to the same problems", hint="evaluate it on the same --tasks")
    only = ["only this correct", "only that correct", "p (exact McNemar)"]
    return {
        "title": f"{config.model} beside {earlier.config.get('model')}",
        "columns": ["task", "method", "n", "this", "that", *only],
        "rows": lines,
        "note": "Pairs of answers to the same problems; where they were repeated, the first.",
    }


def _beside(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    ours, theirs = ([row["status"] == "correct" for row in side] for side in zip(*pairs, strict=True))
    test, n = mcnemar(ours, theirs), len(pairs)
    shares = [f"{sum(side) / n:.3f}" for side in (ours, theirs)]
    return [str(n), *shares, str(test.only_first), str(test.only_second), f"{test.p:.2g}"]
