from __future__ import annotations

import asyncio
import itertools

import pytest

from luthier.core.stats import mcnemar, wilson
from luthier.tasks.grading import Grader
from luthier.tasks.metrics import accuracy, auroc, flips, majority_at_k, pass_at_k, pass_at_k_over, reliability
from luthier.tasks.task import Problem


def test_failed_calls_count_as_wrong_only_overall() -> None:
    result = accuracy(["correct", "wrong", "failed", "correct"])
    assert result.completed is not None
    assert (result.overall.value, result.completed.value, result.completed.n) == (0.5, 2 / 3, 3)
    assert accuracy(["failed"]).completed is None


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one() -> None:
    samples = [True, False, False, True, False]
    for k in range(1, 6):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(2, 5, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(1, 2, 3)


def test_majorities_are_counted_by_meaning() -> None:
    problem = Problem(id="1", prompt="", answer="1/2")

    async def run(answers: list[str | None], k: int) -> float:
        async with Grader() as grader:
            return (await majority_at_k([answers], [problem], grader, k=k)).value

    assert asyncio.run(run(["0.5", r"\frac12", "3", "3.1", None], 5)) == 1.0
    assert asyncio.run(run([None, None], 2)) == 0.0
    assert 0.2 < asyncio.run(run(["0.5", "3"], 1)) < 0.8


def test_auroc_is_the_chance_of_the_right_order() -> None:
    scores, labels = [0.1, 0.4, 0.4, 0.8, 0.8], [False, False, True, True, False]
    pairs = [(a, b) for a, x in zip(scores, labels, strict=True) for b, y in zip(scores, labels, strict=True) if x > y]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auroc(scores, labels) == pytest.approx(expected)
    assert auroc(scores, [True] * 5) is None


def test_reliability_bins_hold_every_item_once() -> None:
    bins = reliability([0.0, 0.05, 0.95, 1.0], [False, True, True, True])
    assert [(one.accuracy.n, one.accuracy.value) for one in bins] == [(2, 0.5), (2, 1.0)]


def test_flips() -> None:
    assert flips([True, True, False, False], [False, True, True, False]) == (1, 1)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second) == (8, 2)
    assert result.p == pytest.approx(0.109375)  # 2 * P(X <= 2), X ~ Binomial(10, 1/2)
    assert mcnemar(first, first).p == 1.0
    assert mcnemar(second, first).p == result.p


def test_pass_at_k_over_problems_is_their_mean() -> None:
    found = pass_at_k_over([8, 0, 2, 4], 8, 2)
    by_hand = [1.0, 0.0, 1 - (6 * 5) / (8 * 7), 1 - (4 * 3) / (8 * 7)]  # two draws without replacement, both wrong
    assert found.value == pytest.approx(sum(by_hand) / 4)
    assert (found.n, found.low <= found.value <= found.high) == (4, True)
    assert pass_at_k_over([8, 0, 2, 4], 8, 1).value == pytest.approx(14 / 32)
    assert pass_at_k_over([8, 0, 2, 4], 8, 8).value == 0.75


def test_pass_at_k_of_problems_solved_never_or_always_has_a_width() -> None:
    assert pass_at_k_over([0] * 20, 4, 2) == wilson(0, 20)
    assert pass_at_k_over([4] * 20, 4, 2) == wilson(20, 20)
    alike = pass_at_k_over([4] * 10 + [0] * 10, 4, 1)  # four equal samples tell no more than one
    assert (alike.low, alike.high) == pytest.approx(wilson(10, 20)[1:3], abs=0.05)
