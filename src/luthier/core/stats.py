"""Numbers with intervals: Wilson, bootstrap, paired differences; and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

# 97.5 % points of Student's distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Interval(NamedTuple):
    """A value with its confidence interval and the number of items behind it."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 3) -> str:
        """'1.234 [1.200, 1.270]'."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); valid at 0 and n successes too."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, min(p, center - half)), min(1.0, max(p, center + half)), n)  # rounding stays inside


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of sum(numerators) / sum(denominators) over items, e.g. bits per byte over documents."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if top.shape != bottom.shape or top.ndim != 1 or len(top) == 0:
        raise ValueError(f"bootstrap_ratio needs two equal, non-empty rows, got shapes {top.shape} and {bottom.shape}")
    rng = np.random.Generator(np.random.PCG64(seed))
    n, ratios = len(top), np.empty(resamples)
    chunk = max(1, 4_000_000 // n)  # bounds memory at about 32 MB a chunk
    for start in range(0, resamples, chunk):
        picks = rng.integers(0, n, size=(min(chunk, resamples - start), n))
        ratios[start : start + chunk] = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high), n)


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of a mean."""
    return bootstrap_ratio(values, np.ones(len(values)).tolist(), seed=seed, resamples=resamples, confidence=confidence)


def bootstrap_median(
    values: Sequence[float], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of a median: for timings, where a few stalls must not count."""
    known = np.asarray(values, float)
    if known.ndim != 1 or len(known) == 0:
        raise ValueError(f"bootstrap_median needs a non-empty row, got shape {known.shape}")
    picks = np.random.Generator(np.random.PCG64(seed)).integers(0, len(known), size=(resamples, len(known)))
    low, high = np.quantile(np.median(known[picks], 1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.median(known)), float(low), float(high), len(known))


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of mean(a - b) over pairs measured on the same items; ValueError for unequal lengths."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return bootstrap_mean(differences, seed=seed, resamples=resamples, confidence=confidence)


def student_mean(values: Sequence[float]) -> Interval:
    """Mean of a few independent values, such as one a seed, with Student's 95 % interval.

    ValueError for fewer than two values, or more than are tabulated.
    """
    if len(values) - 1 not in STUDENT:
        raise ValueError(f"student_mean needs 2 to {max(STUDENT) + 1} values, got {len(values)}")
    half = STUDENT[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half, len(values))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A code length in nats over UTF-8 bytes, as bits per byte."""
    return nats / math.log(2) / num_bytes


class McNemar(NamedTuple):
    """Two methods on the same items: how often only one of them was right, and whether that may be chance."""

    only_first: int
    only_second: int
    p: float
    """Exact, two-sided."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact paired test (McNemar 1947; binomial on the items where the two differ). ValueError for unequal lengths."""
    pairs = list(zip(first, second, strict=True))
    one, two = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n, smaller = one + two, min(one, two)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return McNemar(one, two, min(1.0, 2 * tail))
