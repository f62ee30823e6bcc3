"""What is measured once with the starting weights, and kept in the run folder: a resumed run reads it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from luthier.core.config import digest
from luthier.core.files import read_json, write_json
from luthier.core.run import RunFolder
from luthier.learn.parallel import Ranks


def rows_digest(rows: Iterable[Any]) -> str:
    """A SHA-256 of rows and their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return found.hexdigest()


def measured_once(
    name: str,
    of: Sequence[Any],
    count: int,
    measure: Callable[[], Sequence[float]],
    *,
    who: Ranks,
    run: RunFolder | None,
) -> list[float]:
    """`count` numbers that all ranks get: from the file `name` of the run if it was made of the same, else new ones.

    of: everything that the numbers depend on, as JSON values. `measure` is called on all ranks and returns the same
    numbers on each; only the main rank has a `run`.
    """
    key = digest({"of": list(of)})
    stored = _stored(run.path / name, key) if run is not None else None
    if who.sum([float(stored is not None)])[0]:
        return who.sum(stored if stored is not None else [0.0] * count)
    values = [float(value) for value in measure()]
    if run is not None:
        write_json(run.path / name, {"of": key, "values": values})
    return values


def _stored(path: Path, key: str) -> list[float] | None:
    found = read_json(path) if path.exists() else {}
    return list(found["values"]) if found.get("of") == key else None
