"""Appends benchmark rows to benchmarks/results/NAME.jsonl, each with machine, versions and commit."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from luthier.core.env import snapshot
from luthier.core.files import append_jsonl

RESULTS = Path(__file__).parent / "results"


def record(name: str, **values: Any) -> None:
    """Append one row and print it."""
    row = {"date": datetime.date.today().isoformat(), **values, "env": snapshot()}
    RESULTS.mkdir(exist_ok=True)
    append_jsonl(RESULTS / f"{name}.jsonl", row)
    for key, value in values.items():
        print(f"{key}: {value}")
