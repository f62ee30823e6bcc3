"""Metric rows to numbers worth drawing: pure functions, no drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

BOOKKEEPING = ("kind", "step", "tokens", "seconds")  # where a row stands; not something that was measured


def number(value: object) -> float:
    """The value as a float; NaN for what is no number (None, text, booleans)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def latest_by_step(rows: Sequence[Row]) -> list[Row]:
    """Rows in order of their step, the last written row of each step: a resumed run repeats the steps it lost."""
    if not all(math.isfinite(number(row.get("step"))) for row in rows):
        return list(rows)
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def x_axis(rows: Sequence[Row]) -> str:
    """What the rows can be placed by: 'tokens' where each has them, else 'step', else 'row' (the position)."""
    for key in ("tokens", "step"):
        if rows and all(math.isfinite(number(row.get(key))) for row in rows):
            return key
    return "row"


def points(rows: Sequence[Row], key: str, axis: str) -> tuple[list[float], list[float]]:
    """x and y of the rows that have `key`; y keeps NaN and infinities as NaN, which leave a gap in a line."""
    placed = [
        (number(row[axis]) if axis != "row" else float(i), number(row[key])) for i, row in enumerate(rows) if key in row
    ]
    return [x for x, _ in placed], [y if math.isfinite(y) else math.nan for _, y in placed]


def measured_keys(rows: Sequence[Row]) -> list[str]:
    """Keys that are numbers in at least two rows, in order of first appearance, without the bookkeeping."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in BOOKKEEPING)
    return [key for key in keys if sum(math.isfinite(number(row.get(key))) for row in rows) >= 2]


def constant(rows: Sequence[Row], key: str) -> bool:
    """Whether all rows that have `key` have the same value: a number to state, not a curve to draw."""
    return len({number(row[key]) for row in rows if key in row}) == 1


def smoothing_window(count: int) -> int:
    """Rows that a moving average spans: about a thirtieth of the curve."""
    return max(1, round(count / 30))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centered moving average over `window` rows; NaN stays NaN and does not count.

    At the start the window is short and symmetric, so that a steep beginning is not bent; at the end it is one-sided,
    so that the last value is an average too.
    """
    total, count = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        total.append(total[-1] + (value if finite else 0.0))
        count.append(count[-1] + finite)
    out = []
    for i, value in enumerate(values):
        reach = min(window // 2, i)
        low, high = i - reach, min(i + reach + 1, len(values))
        out.append((total[high] - total[low]) / (count[high] - count[low]) if math.isfinite(value) else math.nan)
    return out


def thin(x: Sequence[float], y: Sequence[float], limit: int = 500) -> tuple[list[float], list[float]]:
    """At most about `limit` points that keep each visible spike: lowest and highest of each bucket, and both ends."""
    if len(x) <= limit:
        return list(x), list(y)
    kept, buckets = {0, len(x) - 1}, limit // 2
    for bucket in range(buckets):
        span = range(bucket * len(x) // buckets, (bucket + 1) * len(x) // buckets)
        finite = [i for i in span if math.isfinite(y[i])]
        kept |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)} if finite else {span[0]}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]
