"""How far a student is from its teacher. Pure functions of samples and log-probabilities; nats and tokens throughout.

The primary measure is quality at the teacher's lengths (`matched_mean`): plain validity and reverse KL both rank a
student first that learned to write next to nothing, since little can be wrong in a short reply (docs/distill.md). Give
length and diversity with every score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.core.stats import Interval, bootstrap_mean, bootstrap_ratio, paired_difference, wilson

Floats = npt.NDArray[np.float64]
ORDERS = (1, 2, 3, 4, 5, 6)


def validity(valid: Sequence[bool]) -> Interval:
    """Share of replies that the teacher could have written, with Wilson's interval."""
    return wilson(sum(valid), len(valid))


def length_edges(teacher_lengths: Sequence[int], bins: int = 8) -> list[float]:
    """Inner edges of at most `bins` bins of lengths, each with about as many teacher replies; an edge opens a bin.

    Bins and not single lengths: where only even lengths can be valid, students fail by odd ones, which no teacher has.
    """
    if not len(teacher_lengths) or bins < 1:
        raise ValueError(f"length_edges needs teacher lengths and bins >= 1, got {len(teacher_lengths)} and {bins}")
    inner = np.quantile(teacher_lengths, np.arange(1, bins) / bins, method="higher")
    return sorted({float(edge) for edge in inner if edge > min(teacher_lengths)})


class Matched(NamedTuple):
    """A mean at the teacher's lengths. `value` is None where too little of their range is covered by the student."""

    value: float | None
    covered: float
    """Share of the teacher's replies in bins that hold enough of the student's."""


def matched_mean(
    values: Sequence[float],
    lengths: Sequence[int],
    teacher_lengths: Sequence[int],
    *,
    bins: int = 8,
    least: int = 5,
    coverage: float = 0.75,
) -> Matched:
    """Mean of `values` with each bin of lengths weighted as often as it occurs with the teacher (§8.3).

        sum_b P_teacher(b) · mean(values in b) / sum_b P_teacher(b),   over bins b with at least `least` student replies

    values: quality of each student reply, such as 1 for valid and 0 for not; lengths: its tokens. None when the bins
    that count hold less than `coverage` of the teacher's replies: then nothing is known about its lengths.
    """
    edges = length_edges(teacher_lengths, bins)
    own, theirs = np.digitize(lengths, edges), np.digitize(teacher_lengths, edges)
    quality = np.asarray(values, float)
    if quality.shape != own.shape:
        raise ValueError(f"matched_mean needs a length for each value, got {len(quality)} and {len(own)}")
    weighted = covered = 0.0
    for which in range(len(edges) + 1):
        inside = own == which
        if inside.sum() >= least:
            share = float((theirs == which).mean())
            weighted += share * float(quality[inside].mean())
            covered += share
    return Matched(weighted / covered if covered >= coverage else None, covered)


def forward_kl(teacher_logprobs: Sequence[float], student_logprobs: Sequence[float]) -> Interval:
    """KL(teacher || student) in nats per reply, from the log-probabilities of the same *teacher* samples under both.

    High where the student misses what the teacher does.
    """
    return paired_difference(_finite(teacher_logprobs), _finite(student_logprobs))


def reverse_kl(student_logprobs: Sequence[float], smoothed_teacher_logprobs: Sequence[float]) -> Interval:
    """KL(student || smoothed teacher) in nats per reply, from *student* samples; see `smoothed`.

    High where the student does what the teacher never does. It sums over tokens: short replies make it small.
    """
    return paired_difference(_finite(student_logprobs), _finite(smoothed_teacher_logprobs))


def smoothed(conditionals: Floats, tokens: Sequence[int], share: float = 0.02) -> float:
    """Log-probability (nats) of `tokens` under a teacher that takes a uniform token with probability `share` (§8.3).

    conditionals: (T, V) probabilities of each next token; a row of NaN, after what the teacher cannot write, counts as
    uniform: the rest of a broken reply is neither right nor wrong. tokens: T indices; -1 is a token outside of V, which
    counts as one of V.
    """
    known = np.asarray(conditionals, float)
    if known.ndim != 2 or len(known) != len(tokens) or not 0 < share <= 1:
        got = f"{known.shape}, {len(tokens)} and {share}"
        raise ValueError(f"smoothed needs a row for each token and 0 < share <= 1, got {got}")
    size = known.shape[1]
    rows = np.where(np.isnan(known), 1 / size, (1 - share) * known + share / size)
    least = np.where(np.isnan(known[:, :1]), 1, share) / size  # what a token gets that the teacher does not know
    rows = np.concatenate([rows, least], axis=1)  # so that index -1 finds it
    return float(np.log(rows[np.arange(len(rows)), np.asarray(tokens, int)]).sum())


def entropy(logprobs: Sequence[float]) -> Interval:
    """Entropy of the student's replies in nats, from the log-probabilities of its own samples: mean of -ln q(y)."""
    return bootstrap_mean([-value for value in _finite(logprobs)])


def unique_share(replies: Sequence[Hashable]) -> float:
    """Different replies over all of them. It falls with their number: compare equal numbers only."""
    return len(set(replies)) / len(replies)


def length_drift(lengths: Sequence[int], teacher_lengths: Sequence[int]) -> float:
    """Mean length over the teacher's mean length, minus 1: 0.25 is a quarter longer."""
    return float(np.mean(lengths) / np.mean(teacher_lengths) - 1)


def ngram_f1(reply: Sequence[Hashable], other: Sequence[Hashable], n: int) -> float | None:
    """F1 of the n-grams that two replies share, each counted as often as both have it; None where neither has any."""
    own, theirs = _ngrams(reply, n), _ngrams(other, n)
    total = own.total() + theirs.total()
    return 2 * (own & theirs).total() / total if total else None


def overlap(
    replies: Sequence[Sequence[Hashable]], teacher: Sequence[Sequence[Hashable]], orders: Sequence[int] = ORDERS
) -> dict[int, Interval]:
    """Mean n-gram F1 of replies with the teacher's to the same prompts, for each order (§4.6).

    Orders that are longer than all replies are left out. Read it with the lengths: longer replies share less.
    """
    found: dict[int, Interval] = {}
    for n in orders:
        scores = [ngram_f1(reply, other, n) for reply, other in zip(replies, teacher, strict=True)]
        if known := [score for score in scores if score is not None]:
            found[n] = bootstrap_mean(known)
    return found


def pairwise_accuracy(teacher_scores: Sequence[float], student_scores: Sequence[float]) -> Interval:
    """How often the teacher's reply to a prompt scores higher than the student's; ties count half.

    The interval is a bootstrap over prompts: give one pair a prompt, or `clustered_accuracy` several.
    """
    return clustered_accuracy([[score] for score in teacher_scores], [[score] for score in student_scores])


def clustered_accuracy(
    teacher_scores: Sequence[Sequence[float]], student_scores: Sequence[Sequence[float]]
) -> Interval:
    """The same over all pairs of teacher and student replies to a prompt; both by prompt, which the bootstrap draws."""
    wins, pairs = list[float](), list[float]()
    for of_teacher, of_student in zip(teacher_scores, student_scores, strict=True):
        gaps = np.subtract.outer(np.asarray(of_teacher, float), np.asarray(of_student, float))
        wins.append(float((gaps > 0).sum() + 0.5 * (gaps == 0).sum()))
        pairs.append(float(gaps.size))
    return bootstrap_ratio(wins, pairs)


def compare_arms(scores: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Interval]:
    """Mean difference of each arm from the baseline over seeds, paired: score s of every arm is from the same seed."""
    return {arm: paired_difference(values, scores[baseline]) for arm, values in scores.items() if arm != baseline}


def _ngrams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _finite(logprobs: Sequence[float]) -> list[float]:
    if not np.isfinite(logprobs).all():
        raise ValueError("log-probabilities must be finite: smooth those of replies that the teacher never writes")
    return list(logprobs)
