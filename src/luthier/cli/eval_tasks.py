"""`luthier eval --tasks`: problems solved by each method, what that costs, and whether the difference may be chance."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.cli.models import open_model, open_role
from luthier.core.config import to_mapping
from luthier.core.console import Advance, Console
from luthier.core.run import RunFolder
from luthier.core.stats import mcnemar
from luthier.llm.cache import CachedBackend
from luthier.llm.prices import Prices
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.trace import Trace, TraceFile
from luthier.tasks.catalog import open_task
from luthier.tasks.grading import Grader
from luthier.tasks.metrics import accuracy, flips
from luthier.tasks.runner import Row, run_task
from luthier.tasks.task import Task

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig

COLUMNS = ["method", "correct", "95 % interval", "n", "unread", "failed", "tokens", "calls", "mended", "broken"]
NOTE = (
    "Correct: of all problems, where a failed call counts as wrong. Interval: Wilson, over problems. Unread: no answer "
    "found, or one that cannot be compared in time. Tokens, calls: generated tokens and requests for a problem, mean. "
    "Mended, broken: answers that later rounds turned right and wrong."
)
MAY_CHANGE = ("out", "device", "method", "tasks", "equal_to", "limit", "by", "at_once", "traces", "repeats", "endpoint")


def run(config: EvalConfig, console: Console) -> None:
    """Solve every task with every method; rows, replies and tables stay in the run folder."""
    tasks = [open_task(name, limit=config.limit) for name in config.tasks]
    for method in [*config.method, *filter(None, [config.equal_to])]:
        parse_method(method)
    assert config.out is not None
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        rows = asyncio.run(_solve_all(config, tasks, folder, console))
        tables = [table for task in tasks for table in _tables(task, rows[task.name], config)]
        for table in tables:
            console.table(**table)
        for note in _failures(rows):
            console.status(note)
        headline = {f"{t.name}, {m}": _share(r) for t in tasks for m, r in rows[t.name].items()}
        folder.write_summary({"verb": "eval", "headline": headline, "tables": tables})
        console.result({"tasks": {task.name: _numbers(rows[task.name]) for task in tasks}})


async def _solve_all(
    config: EvalConfig, tasks: Sequence[Task], folder: RunFolder, console: Console
) -> dict[str, dict[str, list[Row]]]:
    """Rows by task and method."""
    cache = folder.path / "replies.sqlite"
    inner = open_model(config.model, endpoint=config.endpoint, device=config.device)
    roles = dict(open_role(text) for text in config.role)
    backends = [CachedBackend(backend, cache) for backend in (inner, *roles.values())]
    price = Prices.read(config.prices).cost if config.prices else None
    models = Models(backends[0], dict(zip(roles, backends[1:], strict=True)), price)
    found: dict[str, dict[str, list[Row]]] = {}
    try:
        async with Grader() as grader:
            for task in tasks:
                solver = _Solving(config, task, folder, models, grader, console)
                found[task.name] = {method: await solver.rows(method) for method in dict.fromkeys(config.method)}
                if config.equal_to:
                    vote = await solver.equal_vote()
                    found[task.name][vote] = await solver.rows(vote)
    finally:
        for backend in backends:
            await backend.aclose()
    return found


class _Solving:
    """One task with the models, the grader and the place for its rows."""

    def __init__(
        self, config: EvalConfig, task: Task, folder: RunFolder, models: Models, grader: Grader, console: Console
    ) -> None:
        self.config, self.task, self.folder = config, task, folder
        self.models, self.grader, self.console = models, grader, console

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
                repeats=self.config.repeats,
                at_once=self.config.at_once,
                seed=self.config.seed,
                advance=_one(advance),
            )

    async def equal_vote(self) -> str:
        """The majority vote that generates as many tokens for a problem as the method `equal_to` does."""
        reference, single = await self.rows(self.config.equal_to), await self.rows(_like(self.config.equal_to, "cot"))
        k = max(1, round(_mean(reference, "completion_tokens") / max(_mean(single, "completion_tokens"), 1)))
        return _like(self.config.equal_to, f"maj@{k}")

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
    names = ("prompts", "temperature", "max_tokens")
    changed = [f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(usual, n)]
    return f"{method}:{','.join(changed)}" if changed else method


def _one(advance: Advance) -> Any:
    return lambda: advance(1)


def _tables(task: Task, by_method: Mapping[str, list[Row]], config: EvalConfig) -> Iterator[dict[str, Any]]:
    title = f"{task.name}: {len(task.problems)} problems, {config.model}, seed {config.seed}"
    yield {"title": title, "columns": COLUMNS, "rows": [_line(m, r) for m, r in by_method.items()], "note": NOTE}
    if config.by:
        groups = {problem.id: str(problem.metadata.get(config.by, "none")) for problem in task.problems}
        lines = [
            [value, *_line(method, [row for row in rows if groups[row["problem"]] == value])]
            for value in dict.fromkeys(groups.values())
            for method, rows in by_method.items()
        ]
        yield {"title": f"{task.name} by {config.by}", "columns": [config.by, *COLUMNS], "rows": lines, "note": ""}
    if len(by_method) > 1:
        yield _pairs(task, by_method)


def _failures(rows: Mapping[str, Mapping[str, list[Row]]]) -> Iterator[str]:
    """How many problems of each task and method failed, and the first reason."""
    for task, by_method in rows.items():
        for method, some in by_method.items():
            if failed := [row for row in some if row["status"] == "failed"]:
                yield f"{task}, {method}: {len(failed)} failed, the first with: {failed[0]['error']}"


def _line(method: str, rows: Sequence[Row]) -> list[str]:
    result = accuracy([row["status"] for row in rows])
    answered = [row for row in rows if row["status"] != "failed"]
    mended, broken = flips(
        [row["first_status"] == "correct" for row in answered], [row["status"] == "correct" for row in answered]
    )
    counts, share = result.statuses, result.overall
    return [
        method,
        f"{share.value:.3f}",
        f"[{share.low:.3f}, {share.high:.3f}]",
        str(share.n),
        str(counts.get("unparsed", 0) + counts.get("timeout", 0)),
        str(counts.get("failed", 0)),
        f"{_mean(answered, 'completion_tokens'):.0f}",
        f"{_mean(answered, 'calls'):.1f}",
        str(mended),
        str(broken),
    ]


def _pairs(task: Task, by_method: Mapping[str, list[Row]]) -> dict[str, Any]:
    lines = []
    names = list(by_method)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            test = mcnemar(*([row["status"] == "correct" for row in by_method[name]] for name in (first, second)))
            lines.append([first, second, str(test.only_first), str(test.only_second), f"{test.p:.2g}"])
    return {
        "title": f"{task.name}: the same problems, pair by pair",
        "columns": ["first", "second", "only first correct", "only second correct", "p (exact McNemar)"],
        "rows": lines,
        "note": "",
    }


def _numbers(by_method: Mapping[str, list[Row]]) -> dict[str, Any]:
    numbers = {}
    for method, rows in by_method.items():
        result, costs = accuracy([row["status"] for row in rows]), [row.get("cost") for row in rows]
        numbers[method] = {
            "accuracy": result.overall._asdict(),
            "completed": result.completed._asdict() if result.completed else None,
            "statuses": result.statuses,
            "completion_tokens": _mean(rows, "completion_tokens"),
            "prompt_tokens": _mean(rows, "prompt_tokens"),
            "calls": _mean(rows, "calls"),
            "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
        }
    return numbers


def _share(rows: Sequence[Row]) -> str:
    share = accuracy([row["status"] for row in rows]).overall
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else 0.0
