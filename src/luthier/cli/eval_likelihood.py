"""`luthier eval --tasks` where texts are scored: which option a model finds the likeliest, by several measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.cli.eval_view import group
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.llm.types import Backend
from luthier.tasks.likelihood import LikelihoodTask, add_examples, read_items
from luthier.tasks.likelihood_metrics import PRIMARY, Result, summarize
from luthier.tasks.likelihood_runner import score_task
from luthier.tasks.runner import Row

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig

COLUMNS = ["method", "measure", "correct", "95 % interval", "n", "failed", "by chance"]
NOTES = {
    "choice": (
        "Correct: the right choice is likelier than every other. sum: the log-probability of a choice; token, byte: "
        "divided by its tokens or UTF-8 bytes; unconditional: minus its log-probability after nothing. "
    ),
    "pair": "Correct: the good text is likelier, by its log-probability, or that divided by its tokens or bytes. ",
    "target": "greedy: the model, which takes the likeliest token each time, writes just the text that should follow. ",
}
NOTE = "Interval: Wilson, over items. An item that cannot be scored counts as wrong."


def with_examples(task: LikelihoodTask, config: EvalConfig) -> LikelihoodTask:
    """The task with the examples that the settings ask for. Raises: ConfigError, DataError."""
    pool = read_items(config.shots_from) if config.shots_from is not None else None
    if pool is not None and pool.kind != task.kind:
        raise ConfigError(
            f"shots_from: {config.shots_from} holds {pool.kind} rows, but {task.name} is of the kind {task.kind}",
            hint="give examples of the same kind",
        )
    return add_examples(task, config.shots, pool=pool, seed=config.seed)


async def score(
    config: EvalConfig, task: LikelihoodTask, backend: Backend, name: str, folder: RunFolder, console: Console
) -> dict[str, list[Row]]:
    """The rows of a task, under the only method that there is."""
    method = f"likelihood, {config.shots} shots" if config.shots else "likelihood"
    with console.progress(len(task.items), f"{task.name}, {method}") as advance:
        rows = await score_task(
            task,
            backend,
            folder.path / "answers.jsonl",
            method=method,
            unconditional=config.unconditional and task.kind == "choice",
            identity=name,
            at_once=config.at_once,
            advance=lambda: advance(1),
        )
    return {method: rows}


def tables(task: LikelihoodTask, by_method: Mapping[str, list[Row]], config: EvalConfig) -> Iterator[dict[str, Any]]:
    """The table of a task, and one by groups of items where that is asked for."""
    title = f"{task.name}: {len(task.items)} items, {config.model}, {task.sha256[:12]}"
    lines = [line for method, rows in by_method.items() for line in _lines(method, summarize(task.kind, rows))]
    note = NOTES[task.kind] + NOTE + _perplexity(task, by_method)
    yield {"title": title, "columns": COLUMNS, "rows": lines, "note": note}
    if config.by:
        groups = {item.id: group(item.metadata, config.by) for item in task.items}
        lines = []
        for values in dict.fromkeys(groups.values()):
            for method, rows in by_method.items():
                some = [row for row in rows if groups[row["problem"]] == values]
                lines += [[*values, *line] for line in _lines(method, summarize(task.kind, some))]
        columns = [*config.by.split(","), *COLUMNS]
        yield {"title": f"{task.name} by {config.by}", "columns": columns, "rows": lines, "note": ""}


def numbers(task: LikelihoodTask, by_method: Mapping[str, list[Row]]) -> dict[str, Any]:
    """The same for --json."""
    found = {}
    for method, rows in by_method.items():
        result = summarize(task.kind, rows)
        found[method] = {
            "accuracy": result.accuracy[PRIMARY[task.kind]]._asdict(),
            "measures": {name: share._asdict() for name, share in result.accuracy.items()},
            "perplexity": result.perplexity._asdict() if result.perplexity else None,
            "chance": result.chance,
            "failed": result.failed,
            "sha256": task.sha256,
        }
    return found


def headline(task: LikelihoodTask, rows: Sequence[Row]) -> str:
    """Accuracy by the measure that is usual for the kind of task, which rows are correct by too."""
    return f"{summarize(task.kind, rows).accuracy[PRIMARY[task.kind]].text()} by {PRIMARY[task.kind]}"


def _lines(method: str, result: Result) -> list[list[str]]:
    failed, chance = str(result.failed), f"{result.chance:.3f}" if result.chance else "—"
    return [
        [method, name, f"{share.value:.3f}", f"[{share.low:.3f}, {share.high:.3f}]", str(share.n), failed, chance]
        for name, share in result.accuracy.items()
    ]


def _perplexity(task: LikelihoodTask, by_method: Mapping[str, list[Row]]) -> str:
    found = [summarize(task.kind, rows).perplexity for rows in by_method.values()]
    values = [f" Perplexity of a whole target: {value.text(2)}, a bootstrap over items." for value in found if value]
    return "".join(values)
