"""`luthier eval --tasks needle:FILE`: how often a model finds a fact, by length of document and depth."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.models import identity, open_local
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.llm.cache import CachedBackend
from luthier.llm.endpoint import Endpoint
from luthier.llm.types import Request
from luthier.tasks.math import read_problems
from luthier.tasks.needles import Cell, Needle, Reader, cells, find_needles
from luthier.tasks.task import Problem

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig
    from luthier.llm.local import LocalModel

PREFIX = "needle:"
MAY_CHANGE = ("out", "device", "tasks", "limit", "at_once", "endpoint")
NOTE = (
    "Correct: the value is in the greedy reply, as a word of its own or right after its name. Interval: Wilson, 95 %. "
    "Loss: nats per token of the right value after the prompt; not known behind an endpoint."
)


def run(config: EvalConfig, console: Console) -> None:
    """Ask for every fact of every file; replies and tables stay in the run folder."""
    if others := [name for name in config.tasks if not name.startswith(PREFIX)]:
        raise ConfigError(f"tasks: {others[0]!r} cannot stand beside {PREFIX}FILE", hint="give each its own --out")
    tasks = {name: _problems(name, config.limit) for name in dict.fromkeys(config.tasks)}
    assert config.out is not None
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        found = asyncio.run(_find(config, tasks, folder.path, console))
        tables = []
        for name, needles in found.items():
            by_place = list(cells(needles))
            tables += [_list(name, config.model, by_place), _grid(name, by_place)]
        for table in tables:
            console.table(**table)
        headline = {f"{name}, {cell.length}": _said(cell) for name, n in found.items() for cell in _totals(cells(n))}
        folder.write_summary({"verb": "eval", "headline": headline, "tables": tables})
        console.result({name: [_numbers(cell) for cell in cells(needles)] for name, needles in found.items()})


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
            _loss(cell),
        ]
        for cell in found
    ]
    columns = ["length", "depth", "correct", "95 % interval", "n", "loss"]
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
    return f"{cell.accuracy.text()}{loss}"


def _depth(cell: Cell) -> str:
    return "all" if cell.depth is None else f"{cell.depth:g}"


def _loss(cell: Cell) -> str:
    return "—" if cell.loss is None else f"{cell.loss:.3f}"


def _numbers(cell: Cell) -> dict[str, Any]:
    return {"length": cell.length, "depth": cell.depth, "accuracy": cell.accuracy._asdict(), "loss": cell.loss}
