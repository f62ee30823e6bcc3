from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from luthier.distill.baselines import (
    CLASSIFIERS,
    Duel,
    LengthFeatures,
    NgramFeatures,
    baseline_accuracies,
    best_of_n,
    best_temperature,
    bradley_terry,
    fit,
    held_out_accuracy,
    sweep,
)
from luthier.distill.bracket_teacher import BracketBackend, BracketTeacher
from luthier.llm.types import Request

TEACHER = BracketTeacher()
ROUND = str.maketrans("[]", "()")


def duels(count: int, student: BracketTeacher, seed: int) -> list[Duel]:
    draw = random.Random(seed)
    return [
        Duel([TEACHER.draw(p, draw)], [student.draw(p, draw) for _ in range(2)]) for p in TEACHER.prompts(count, seed)
    ]


def test_the_fit_solves_its_equations() -> None:
    """At the minimum, penalty · w = mean of sigmoid(-w·d) d; and in one dimension the optimum is known."""
    rows = np.random.default_rng(0).standard_normal((50, 4))
    weights = bradley_terry(rows, penalty=0.01)
    doubt = 1 / (1 + np.exp(rows @ weights))
    np.testing.assert_allclose(0.01 * weights, rows.T @ doubt / 50, atol=1e-6)
    wins = np.array([[1.0]] * 3 + [[-1.0]])  # three of four: sigmoid(w) = 3/4
    assert bradley_terry(wins, penalty=1e-9, steps=20_000) == pytest.approx(np.log(3), abs=1e-4)


def test_length_tells_longer_from_shorter_and_any_other_law() -> None:
    longer = [Duel(["a" * 9], ["a" * draw]) for draw in (2, 3, 4, 5)]
    assert held_out_accuracy(fit(longer, LengthFeatures), longer).value == 1
    between = [Duel(["a" * 10], ["a" * draw]) for draw in (2, 3, 18, 19)] * 5
    scorer = fit(between, LengthFeatures)
    low, middle, high = scorer(["a" * 2, "a" * 10, "a" * 19])
    assert middle > max(low, high)


def test_length_alone_sees_nothing_else() -> None:
    same = [Duel(["abba"], ["cddc"])] * 4
    assert held_out_accuracy(fit(same, LengthFeatures), same).value == 0.5
    assert held_out_accuracy(fit(same, NgramFeatures), same).value == 1


def test_nobody_tells_the_teacher_from_itself() -> None:
    train, held_out = duels(300, TEACHER, 1), duels(300, TEACHER, 2)
    for accuracy in baseline_accuracies(train, held_out).values():
        assert accuracy.value == pytest.approx(0.5, abs=0.1)  # four standard deviations
        assert accuracy.n == 300


def test_a_student_that_opens_more_is_told_by_its_length_and_one_with_other_types_by_ngrams() -> None:
    wide = BracketTeacher(opening=0.55)
    found = baseline_accuracies(duels(200, wide, 1), duels(200, wide, 2))
    assert list(found) == list(CLASSIFIERS)
    assert found["length"].low > 0.6
    plain, draw = BracketTeacher(opening_spread=0.0, table_seed=5, type_spread=0.0), random.Random(0)
    pairs = [Duel([plain.draw(p, draw)], [plain.draw(p, draw).translate(ROUND)]) for p in plain.prompts(200)]
    found = baseline_accuracies(pairs[:100], pairs[100:])
    assert found["n-grams"].low > 0.75 > found["length"].high


def test_the_end_counts_as_a_token() -> None:
    finished = [Duel([[*"()", "end"]], [[*"()"]])]
    assert fit(finished, NgramFeatures)([[*"()", "end"], [*"()"]]).argmax() == 0
    with pytest.raises(ValueError, match="got none"):
        fit([Duel([], ["a"])], LengthFeatures)


def test_best_of_n_takes_the_first_of_the_highest() -> None:
    assert best_of_n([["aa", "b", "cc"], ["d"]], lambda group: [len(text) for text in group]) == ["aa", "d"]


def test_a_sweep_asks_at_every_temperature_and_cold_samples_are_less_diverse() -> None:
    requests = [Request(prompt=p, n=4, seed=1) for p in TEACHER.prompts(20)]
    found = asyncio.run(sweep(BracketBackend(TEACHER), requests, (1.0, 0.3)))
    kinds = {t: len({c.text for group in groups for c in group}) for t, groups in found.items()}
    assert [len(groups) for groups in found.values()] == [20, 20]
    assert kinds[0.3] < kinds[1.0]
    assert best_temperature({1.0: 0.5, 0.5: 0.7, 0.3: None}) == 0.5
    with pytest.raises(ValueError, match="no temperature"):
        best_temperature({1.0: None})
