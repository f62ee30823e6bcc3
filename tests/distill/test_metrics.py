from __future__ import annotations

import math
import random

import numpy as np
import pytest

from luthier.distill import metrics
from luthier.distill.bracket_teacher import BracketTeacher


def test_validity_is_a_share() -> None:
    assert metrics.validity([True, True, True, False])[0] == 0.75


def test_edges_open_bins_of_about_equal_mass() -> None:
    lengths = [2] * 10 + [4] * 10 + [6] * 10 + [8] * 10
    assert metrics.length_edges(lengths, 4) == [4, 6, 8]
    assert metrics.length_edges([5, 5, 5], 4) == []
    with pytest.raises(ValueError, match="bins >= 1"):
        metrics.length_edges([])


def test_matched_mean_is_the_students_quality_at_the_teachers_lengths() -> None:
    """Student: 90 short replies, all right, 10 long ones, half of them. Teacher: as many short ones as long ones."""
    lengths, values = [2] * 90 + [8] * 10, [1.0] * 95 + [0.0] * 5
    found = metrics.matched_mean(values, lengths, [2] * 50 + [8] * 50)
    assert found == (pytest.approx(0.5 * 1.0 + 0.5 * 0.5), pytest.approx(1.0))
    assert np.mean(values) == 0.95


def test_matched_mean_counts_odd_lengths_that_the_teacher_never_has() -> None:
    lengths, values = [4] * 10 + [5] * 10, [1.0] * 10 + [0.0] * 10
    assert metrics.matched_mean(values, lengths, [2] * 10 + [4] * 10 + [6] * 10).value is None
    assert metrics.matched_mean(values, lengths, [4] * 10).value == 0.5


def test_matched_mean_says_nothing_of_lengths_that_the_student_does_not_have() -> None:
    found = metrics.matched_mean([1.0] * 100, [2] * 100, [2] * 20 + [12] * 80)
    assert found.value is None
    assert found.covered == pytest.approx(0.2)
    with pytest.raises(ValueError, match="a length for each value"):
        metrics.matched_mean([1.0], [2, 2], [2])


def test_matched_mean_is_the_plain_mean_for_the_teacher_itself() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(2, 30) for _ in range(500)]
    values = [draw.random() for _ in lengths]
    assert metrics.matched_mean(values, lengths, lengths).value == pytest.approx(np.mean(values))


def test_divergences_of_two_known_coins() -> None:
    """p = (0.5, 0.5), q = (0.75, 0.25), with samples in exactly these proportions."""
    p, q = np.log([0.5, 0.5]), np.log([0.75, 0.25])
    forward = metrics.forward_kl([p[0], p[1]] * 50, [q[0], q[1]] * 50)
    reverse = metrics.reverse_kl([q[0]] * 75 + [q[1]] * 25, [p[0]] * 75 + [p[1]] * 25)
    assert forward.value == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert reverse.value == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert forward.low <= forward.value <= forward.high
    assert metrics.forward_kl([p[0]] * 3, [p[0]] * 3)[:3] == (0, 0, 0)
    with pytest.raises(ValueError, match="finite"):
        metrics.forward_kl([-math.inf], [0.0])


def test_smoothing_mixes_a_uniform_token_in() -> None:
    rows = np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [np.nan] * 4])
    found = metrics.smoothed(rows, [0, 3, 1], share=0.2)
    assert found == pytest.approx(math.log(0.8 * 0.5 + 0.05) + math.log(0.05) + math.log(0.25))
    assert metrics.smoothed(rows[[0, 2]], [-1, -1], share=0.2) == pytest.approx(math.log(0.05) + math.log(0.25))
    with pytest.raises(ValueError, match="a row for each token"):
        metrics.smoothed(rows, [0])


def test_the_smoothed_teacher_is_a_distribution_over_whole_replies() -> None:
    """Over all strings of two tokens of a teacher with one type of bracket, broken ones included."""
    teacher = BracketTeacher(types=1, max_tokens=4)
    total = 0.0
    for first in range(3):
        for second in range(3):
            reply = "".join(teacher.tokens[token] if token < 2 else "$" for token in (first, second))
            rows = teacher.conditionals("abc", reply)[:2]
            total += math.exp(metrics.smoothed(rows, [first, second]))
    assert total == pytest.approx(1)


def test_entropy_of_a_known_student() -> None:
    assert metrics.entropy([math.log(0.25)] * 8).value == pytest.approx(math.log(4))


def test_diversity_and_length() -> None:
    assert metrics.unique_share(["a", "b", "a", "a"]) == 0.5
    assert metrics.length_drift([3, 5], [2, 2]) == pytest.approx(1.0)


def test_ngram_overlap_counts_repetitions_once_each() -> None:
    assert metrics.ngram_f1("abcd", "abcd", 2) == 1
    assert metrics.ngram_f1("aaa", "a", 1) == pytest.approx(2 * 1 / 4)
    assert metrics.ngram_f1("abc", "xyz", 1) == 0
    assert metrics.ngram_f1("ab", "abc", 3) == 0
    assert metrics.ngram_f1("ab", "ab", 3) is None
    found = metrics.overlap(["abcd", "ab"], ["abce", "ab"])
    assert sorted(found) == [1, 2, 3, 4]
    assert found[1].value == pytest.approx((0.75 + 1) / 2)
    assert found[4].value == 0


def test_pairwise_accuracy_with_ties() -> None:
    assert metrics.pairwise_accuracy([1, 1, 1, 1], [0, 0, 1, 2]).value == pytest.approx(2.5 / 4)
    assert metrics.clustered_accuracy([[1, 3], [0]], [[2], [0, 0]]).value == pytest.approx((1 + 1) / 4)


def test_arms_are_compared_seed_by_seed() -> None:
    """All seeds move together: the paired interval sees a constant difference, however much seeds vary."""
    scores = {"sft": [0.1, 0.5, 0.9], "gad": [0.2, 0.6, 1.0]}
    difference = metrics.compare_arms(scores, "sft")["gad"]
    assert difference[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert difference.n == 3


def test_a_collapsed_student_looks_best_until_lengths_are_matched() -> None:
    """One writes () whatever is asked, the other errs in the rates of its teacher and in one reply of four."""
    teacher, student = BracketTeacher(), BracketTeacher(table_seed=1)
    prompts, draw = teacher.prompts(200), random.Random(0)

    def divergence(replies: list[str], logprobs: list[float]) -> float:
        pairs = zip(prompts, replies, strict=True)
        rows = [(teacher.conditionals(p, r), [*map(teacher.tokens.find, r), teacher.end]) for p, r in pairs]
        return metrics.reverse_kl(logprobs, [metrics.smoothed(*row) for row in rows]).value

    theirs = [teacher.draw(p, draw) for p in prompts]
    wide = [student.draw(p, draw) for p in prompts]
    own = [student.log_probability(p, r) for p, r in zip(prompts, wide, strict=True)]
    wide[::4] = [r[:-1] + "(" for r in wide[::4]]
    short = ["()"] * 200
    valid = [teacher.is_valid(p, r) for p, r in zip(prompts, wide, strict=True)]
    assert all(teacher.is_valid(p, "()") for p in prompts)
    assert metrics.validity(valid).high < 1
    assert divergence(short, [0.0] * 200) < divergence(wide, own)
    lengths = [len(r) for r in theirs]
    assert metrics.matched_mean([1.0] * 200, [2] * 200, lengths).value is None
    matched = metrics.matched_mean(valid, [len(r) for r in wide], lengths)
    assert matched.value == pytest.approx(0.75, abs=0.1)
