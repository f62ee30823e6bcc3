"""What a stage on a Hugging Face trainer would cost: rows, tokens and updates, from rows on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from luthier.core.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.data.row_source import Row


class Counted(NamedTuple):
    """Rows to train on, and their tokens."""

    rows: int
    tokens: int


class Stage(Protocol):
    """The settings that this module reads."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def epochs(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


Lengths = Callable[["PreTrainedTokenizerFast", "Sequence[Row]"], Sequence[int]]


def counted(config: Stage, kinds: Sequence[str], lengths: Lengths, held_out: float) -> Counted | None:
    """The rows that training would see; None where rows or tokenizer are not on this machine.

    lengths: tokens of each row that is kept.
    """
    if not all(Path(spec).expanduser().exists() for spec in (*config.data, config.model)):
        return None
    from luthier.data.row_source import open_rows, split_rows
    from luthier.data.tokenizer import load_tokenizer

    rows, _ = split_rows(open_rows(config.data, kinds), held_out, config.seed)
    tokens = lengths(load_tokenizer(config.model), rows.rows)
    return Counted(len(tokens), sum(tokens))


def tell_updates(verb: str, config: Stage, found: Counted | None, unit: str, console: Console) -> None:
    """Print updates and tokens, as far as they are known."""
    values: dict[str, Any] = {"updates": config.steps or None}
    if found is not None:
        passes = config.steps * config.batch_size / max(found.rows, 1) if config.steps else config.epochs
        updates = config.steps or math.ceil(config.epochs * math.ceil(found.rows / config.batch_size))
        values = {"rows": found.rows, "updates": updates, "tokens": round(passes * found.tokens)}
        console.print(f"{verb}: {found.rows:,} {unit} of {found.tokens:,} tokens, {passes:.2f} times")
        console.print(f"{updates:,} updates of {config.batch_size} {unit}, {values['tokens']:,} tokens in all")
    else:
        known = f"{config.steps:,} updates" if config.steps else f"{config.epochs:g} times all {unit}"
        console.print(f"{verb}: {known}, {config.batch_size} {unit} at a time")
        console.print("  tokens are counted here once its data and model are on this machine")
    console.result(values)
