from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.stats import (
    bits_per_byte,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    student_mean,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (Wilson score without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.value, interval.n) == (successes / n, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_and_within_bounds(pair: tuple[int, int]) -> None:
    k, n = pair
    a, b = wilson(k, n), wilson(n - k, n)
    assert 0 <= a.low <= a.value <= a.high <= 1
    assert a.low == pytest.approx(1 - b.high)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(k, n)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    """200 experiments of 60 exponential draws: a 90 % interval should hold the mean about 180 times."""
    draw = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        interval = bootstrap_mean(draw.exponential(size=60).tolist(), seed=trial, resamples=400, confidence=0.9)
        held += interval.low <= 1 <= interval.high
    assert 165 <= held <= 192


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    interval, half = bootstrap_mean(values.tolist()), 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_ratio_weighs_items_by_their_denominator() -> None:
    interval = bootstrap_ratio([1.0, 100.0], [1.0, 50.0])
    assert interval.value == pytest.approx(101 / 51)
    assert (interval.low, interval.high, interval.n) == (1.0, 2.0, 2)


def test_the_seed_decides_and_chunks_do_not_matter() -> None:
    values = np.random.default_rng(2).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    many = bootstrap_mean(np.ones(5_000_000).tolist(), resamples=2)  # one resample at a time
    assert (many.value, many.low, many.high) == (1, 1, 1)


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0])])
def test_bootstrap_refuses_unequal_and_empty_rows(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match="bootstrap_ratio needs"):
        bootstrap_ratio(top, bottom)


def test_pairs_are_compared_item_by_item() -> None:
    noise = np.random.default_rng(3).normal(0, 10, size=50)
    interval = paired_difference((noise + 1).tolist(), noise.tolist())
    assert interval.low == pytest.approx(1)
    assert interval.high == pytest.approx(1)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        paired_difference([1.0, 2.0, 3.0], [1.0])


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)


def test_an_interval_as_text() -> None:
    assert wilson(1, 2).text(2) == "0.50 [0.09, 0.91]"


def test_the_mean_of_a_few_values_has_students_interval() -> None:
    found = student_mean([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (pytest.approx(2.0), 3)
    assert found.high - found.value == pytest.approx(4.303 / 3**0.5) == found.value - found.low
    for values in ([1.0], [0.0] * 11):
        with pytest.raises(ValueError, match="2 to 10 values"):
            student_mean(values)
