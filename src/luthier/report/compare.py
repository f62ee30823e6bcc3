"""Several runs on one page: their headline numbers, their curves over each other, and how their settings differ."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from luthier.report import figures
from luthier.report.record import Record
from luthier.report.tables import cell, flatten, table

# kind of row, key, title, unit, smoothed, scale of the y axis
OVERLAYS = (
    ("eval", "bits_per_byte", "Held-out bits per byte", "bits/byte", False, "linear"),
    ("train", "loss", "Training loss", "nats/token", True, "log"),
    ("eval", "loss", "Held-out loss", "nats/token", False, "log"),
    ("train", "tokens_per_second", "Throughput", "tokens/s", True, "zero"),
)


def comparison(records: Sequence[Record]) -> str:
    """The body of a page that compares runs."""
    parts = (("", headlines(records)), ("Curves", curves(records)), ("Settings that differ", settings(records)))
    return "".join(
        f"<section>{f'<h2>{html.escape(title)}</h2>' if title else ''}{inside}</section>"
        for title, inside in parts
        if inside
    )


def headlines(records: Sequence[Record]) -> str:
    """One row a run: name, state and the headline numbers that any of them has."""
    numbers: list[Mapping[str, object]] = [record.summary.get("headline") or {} for record in records]
    keys = list(dict.fromkeys(key for row in numbers for key in row))
    rows = [
        [record.name, record.status, *(row.get(key) for key in keys)]
        for record, row in zip(records, numbers, strict=True)
    ]
    return table(["run", "status", *keys], rows)


def curves(records: Sequence[Record]) -> str:
    """The same measurement of all runs in one figure, for each measurement that at least two runs have."""
    drawn = []
    for kind, key, title, unit, smoothed, scale in OVERLAYS:
        having = [(r.name, r.rows[kind]) for r in records if any(key in row for row in r.rows.get(kind, ()))]
        if len(having) >= 2:
            svg = figures.overlay(having, key, name=f"all-{kind}-{key}", unit=unit, smoothed=smoothed, scale=scale)
            drawn.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>")
    if not drawn:
        return '<p class="none">No two runs have rows of the same kind yet.</p>'
    return f'<div class="grid">{"".join(drawn)}</div>'


def settings(records: Sequence[Record]) -> str:
    """The settings in which the runs differ, one row a setting; not `out`, in which they must."""
    flat = [flatten(r.config) if isinstance(r.config, Mapping) else {} for r in records]
    keys = dict.fromkeys(key for row in flat for key in row if key != "out")
    different = [key for key in keys if len({cell(row.get(key)) for row in flat}) > 1]
    if not different:
        return '<p class="none">None: the runs have the same configuration.</p>'
    return table(["setting", *(r.name for r in records)], [[key, *(row.get(key) for row in flat)] for key in different])
