"""Rows to learn from: conversations, completions, preferences or questions, from files or the hub, with a hash.

`open_rows` turns what a user writes into rows of one kind; `split_rows` holds some of them out, by their question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.data.files import missing_path
from luthier.data.formats import READERS, check_row, detect_kind, read_rows
from luthier.data.sources import HELD_OUT, HUB_ID, TRAIN, load_hub

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowSource:
    """Rows of one kind (a key of `formats.KINDS`) with the name of where they come from."""

    name: str
    kind: str
    rows: Sequence[Row]

    @cached_property
    def sha256(self) -> str:
        """Identity of the rows and their order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        return digest.hexdigest()


def open_rows(specs: Sequence[str], kinds: Sequence[str]) -> RowSource:
    """The rows of all of `specs` (.jsonl or .parquet files, or hub ids), which must be of one of `kinds`.

    Raises: DataError for what cannot be read, for another kind of rows, and for a mixture of kinds.
    """
    parts = [_open(spec, kinds) for spec in specs]
    found = {part.kind for part in parts}
    if len(found) != 1:
        raise DataError(
            f"data: {', '.join(f'{part.name} has {part.kind} rows' for part in parts)}",
            hint="give rows of one kind",
        )
    return RowSource(" + ".join(part.name for part in parts), found.pop(), [row for p in parts for row in p.rows])


def _open(spec: str, kinds: Sequence[str]) -> RowSource:
    path = Path(spec).expanduser()
    if path.suffix in READERS or path.exists():
        if not path.exists():
            raise missing_path(path)
        first = next(READERS[path.suffix](path), None) if path.suffix in READERS else None
        kind = _choose(first[1], kinds, f"{path} row {first[0]}") if first else kinds[0]
        return RowSource(spec, kind, list(read_rows(path, kind)))
    if not HUB_ID.fullmatch(spec):
        raise missing_path(path)
    rows = load_hub(spec)
    kind = _choose(rows[0], kinds, f"{spec} row 1") if len(rows) else kinds[0]
    return RowSource(spec, kind, [check_row(row, kind, f"{spec} row {n}") for n, row in enumerate(rows, 1)])


def _choose(row: Row, kinds: Sequence[str], where: str) -> str:
    """The kind of a first row; of several that fit, the earliest in `kinds`."""
    try:
        found = detect_kind(row, where)
    except DataError:
        fitting = [kind for kind in kinds if _fits(row, kind)]
        if not fitting:
            raise
        return fitting[0]
    if found not in kinds:
        raise DataError(f"{where}: got a {found} row, expected {' or '.join(kinds)}", hint="give other data")
    return found


def _fits(row: Row, kind: str) -> bool:
    try:
        check_row(row, kind, "")
    except DataError:
        return False
    return True


def split_rows(source: RowSource, held_out: float, seed: int) -> tuple[RowSource, RowSource]:
    """(rows to train on, held-out rows), by the hash of seed and question: equal questions stay together.

    held_out: share of the questions, 0 to 1; 0 holds nothing out.
    """
    kept: list[Row] = []
    rest: list[Row] = []
    for row in source.rows:
        digest = hashlib.sha256(f"{seed}\n{_question(row)}".encode()).digest()
        (rest if int.from_bytes(digest[:8], "big") / 2**64 < held_out else kept).append(row)
    name = source.name
    return RowSource(f"{name} {TRAIN}", source.kind, kept), RowSource(f"{name} {HELD_OUT}", source.kind, rest)


def _question(row: Row) -> str:
    asked = row["prompt"] if "prompt" in row else row["messages"]
    if not isinstance(asked, str):
        asked = [m for m in asked if m["role"] != "assistant"]
    return json.dumps(asked, ensure_ascii=False)


def conversation(row: Row) -> list[dict[str, Any]]:
    """A row of kind messages or completion as one conversation; a prompt or completion may be a plain string.

    Of a completion row, replies in the prompt are not learned (`weight` 0).
    """
    if "messages" in row:
        return [dict(message) for message in row["messages"]]
    given = turns("user", row["prompt"])
    return [
        *({**m, "weight": 0} if m["role"] == "assistant" else m for m in given),
        *turns("assistant", row["completion"]),
    ]


def turns(role: str, side: Any) -> list[dict[str, Any]]:
    """One side of a row as messages: a string is one message of that role."""
    return [{"role": role, "content": side}] if isinstance(side, str) else [dict(message) for message in side]
