"""Learning rate by step as in arXiv 2511.10628: warm-up from a tenth of the peak, then cosine or linear."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]

WARMUP_START = 0.1  # of the peak: the warm-up does not start at zero


def learning_rate(
    step: int, *, schedule: Schedule, peak: float, warmup: int, total: int, final_fraction: float
) -> float:
    """Learning rate of the update that follows `step` finished updates.

    `warmup` and `total` count updates; after `total` the value stays at `peak * final_fraction`.
    """
    if step < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    if schedule == "constant":
        return peak
    floor = peak * final_fraction
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
    return peak - (peak - floor) * done
