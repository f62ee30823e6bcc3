"""`luthier eval --tasks needle:FILE`: how often a model finds a fact, by length of document and depth."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.models import identity, open_local
from luthier.cli.run_summary import differences, signed
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.files import write_jsonl
from luthier.core.run import RunFolder
from luthier.llm.cache import CachedBackend
from luthier.llm.endpoint import Endpoint
from luthier.llm.types import Request
from luthier.tasks.math import read_problems
from luthier.tasks.needles import Cell, Needle, Reader, cells, find_needles
from luthier.tasks.runner import Row, task_digest
from luthier.tasks.task import Problem

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig
    from luthier.llm.local import LocalModel

PREFIX = "needle:"
MAY_CHANGE = ("out", "device", "tasks", "limit", "at_once", "endpoint", "against")
NOTE = (
    "Correct: the value is in the greedy reply, as a word of its own or right after its name. Interval: Wilson, 95 %. "
    "Too long: documents that do not fit into the model's context; they count as not found. Loss: nats per token of "
    "the right value after the prompt, of the others; not known behind an endpoint."
)


def run(config: EvalConfig, console: Console) -> None:
    """Ask for every fact of every file; replies, answers and tables stay in the run folder."""
    if others := [name for name in config.tasks if not name.startswith(PREFIX)]:
        raise ConfigError(f"tasks: {others[0]!r} cannot stand beside {PREFIX}FILE", hint="give each its own --out")
    tasks = {name: _problems(name, config.limit) for name in dict.fromkeys(config.tasks)}
    if len({_short(name) for name in tasks}) < len(tasks):
        raise ConfigError("tasks: two files have the same name", hint="rename a file, or give each its own --out")
    assert config.out is not None
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        found = asyncio.run(_find(config, tasks, folder.path, console))
        answers = (row for name, n in found.items() for row in _answers(name, tasks[name], n))
        write_jsonl(folder.path / "answers.jsonl", answers)
        tables = []
        for name, needles in found.items():
            by_place = list(cells(needles))
            tables += [_list(name, config.model, by_place), _grid(name, by_place)]
        if config.against is not None:
            tables.append(_against(config, folder))
        for table in tables:
            console.table(**table)
        headline = {_place(name, cell.length): _said(cell) for name, n in found.items() for cell in _totals(cells(n))}
        folder.write_summary({"verb": "eval", "headline": headline, "tables": tables})
        console.result({name: [_numbers(cell) for cell in cells(needles)] for name, needles in found.items()})


def _answers(name: str, problems: Sequence[Problem], needles: Sequence[Needle]) -> Iterator[Row]:
    """Rows as those of other tasks. What is compared with another model is one length at a time: the method."""
    for problem, needle in zip(problems, needles, strict=True):
        yield {
            "task": _short(name),
            "problem": problem.id,
            "method": _length(needle.length),
            "repeat": 0,
            "sha256": task_digest(problem),
            "gold": problem.answer,
            "status": "failed" if needle.too_long else "correct" if needle.correct else "wrong",
            "text": needle.reply,
            "depth": needle.depth,
            "nats": needle.nats,
            "tokens": needle.tokens,
        }


def _short(name: str) -> str:
    return f"{PREFIX}{Path(name.removeprefix(PREFIX)).stem}"


def _length(tokens: int) -> str:
    return f"length {tokens}"


def _place(name: str, length: int) -> str:
    return f"{_short(name)}, {_length(length)}"


def _against(config: EvalConfig, folder: RunFolder) -> dict[str, Any]:
    """This model minus that of an earlier run, at every length. Raises: DataError without answers to compare."""
    assert config.against is not None
    earlier = RunFolder.read(config.against)
    found = differences(folder.path, earlier.path)
    if not found:
        raise DataError(f"{config.against}: no answers to the same problems", hint="evaluate it on the same --tasks")
    return {
        "title": f"{config.model} minus {earlier.config.get('model')}",
        "columns": ["documents", "n", "correct, difference"],
        "rows": [[name, str(pair.n), signed(pair)] for name, pair in found.items()],
        "note": "The same documents; 95 % bootstrap over them.",
    }


def _problems(name: str, limit: int) -> Sequence[Problem]:
    problems = read_problems(Path(name.removeprefix(PREFIX))).problems
    return problems[:limit] if limit else problems


async def _find(
    config: EvalConfig, tasks: dict[str, Sequence[Problem]], folder: Path, console: Console
) -> dict[str, list[Needle]]:
    inner: LocalModel | Endpoint
    reader = None
    if config.endpoint is None:
        inner = open_local(config.model, device=config.device)
        reader = _reader(config.model, inner)
    else:
        inner = Endpoint(config.endpoint, config.model, concurrency=config.at_once)
    name = identity(config.model, endpoint=config.endpoint)
    backend = CachedBackend(inner, folder / "replies.sqlite", identity=name)
    found = {}
    try:
        for task, problems in tasks.items():
            with console.progress(len(problems), task) as advance:
                found[task] = await find_needles(
                    problems, backend, reader, at_once=config.at_once, advance=partial(advance, 1)
                )
    finally:
        await backend.aclose()
    return found


def _reader(name: str, model: LocalModel) -> Reader:
    """Prompts in the model's chat template, or, without one, as text with a new line after it."""
    from luthier.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)

    def render(prompt: str) -> str:
        if tokenizer.chat_template is None:
            return f"{prompt}\n"
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return Reader(render, lambda text: model.room(Request(prompt=text)))


def _list(name: str, model: str, found: Sequence[Cell]) -> dict[str, Any]:
    rows = [
        [
            f"{cell.length:,}",
            _depth(cell),
            f"{cell.accuracy.value:.3f}",
            f"[{cell.accuracy.low:.3f}, {cell.accuracy.high:.3f}]",
            str(cell.accuracy.n),
            str(cell.too_long),
            _loss(cell),
        ]
        for cell in found
    ]
    columns = ["length", "depth", "correct", "95 % interval", "n", "too long", "loss"]
    return {"title": f"{name}: {model}", "columns": columns, "rows": rows, "note": NOTE}


def _grid(name: str, found: Sequence[Cell]) -> dict[str, Any]:
    """Correct, one row a length and one column a depth."""
    depths = list(dict.fromkeys(_depth(cell) for cell in found))
    values = {(cell.length, _depth(cell)): f"{cell.accuracy.value:.2f}" for cell in found}
    lengths = dict.fromkeys(cell.length for cell in found)
    rows = [[f"{length:,}", *(values.get((length, depth), "—") for depth in depths)] for length in lengths]
    return {"title": f"{name}: correct, by depth", "columns": ["length", *depths], "rows": rows, "note": ""}


def _totals(found: Any) -> list[Cell]:
    return [cell for cell in found if cell.depth is None]


def _said(cell: Cell) -> str:
    loss = "" if cell.loss is None else f", {cell.loss:.3f} nats/token"
    return f"{cell.accuracy.text()}{loss}{f', {cell.too_long} too long' if cell.too_long else ''}"


def _depth(cell: Cell) -> str:
    return "all" if cell.depth is None else f"{cell.depth:g}"


def _loss(cell: Cell) -> str:
    return "—" if cell.loss is None else f"{cell.loss:.3f}"


def _numbers(cell: Cell) -> dict[str, Any]:
    share = cell.accuracy._asdict()
    return {"length": cell.length, "depth": cell.depth, "accuracy": share, "too_long": cell.too_long, "loss": cell.loss}
