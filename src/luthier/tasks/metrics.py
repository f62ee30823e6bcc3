"""What a set of graded answers says: accuracy with intervals, pass@k, maj@k, and whether confidence can be trusted."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.stats import Interval, bootstrap_mean, wilson
from luthier.tasks.grading import Grader, Status
from luthier.tasks.task import Problem


@dataclass(frozen=True)
class Accuracy:
    """Share of correct answers: over all problems, where a failed call counts as wrong, and over the answered ones.

    `completed` is None when every call failed.
    """

    overall: Interval
    completed: Interval | None
    statuses: dict[str, int]
    """How many were correct, wrong, unparsed, timeout (of the grader) or failed (of the model)."""


def accuracy(statuses: Sequence[Status | str]) -> Accuracy:
    """Accuracy with Wilson intervals, from one status a problem. ValueError without any."""
    counts = Counter(statuses)
    correct, answered = counts["correct"], len(statuses) - counts["failed"]
    return Accuracy(wilson(correct, len(statuses)), wilson(correct, answered) if answered else None, dict(counts))


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that one of k of n samples is correct, unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= correct <= n and 1 <= k <= n, got {correct}, {n}, {k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def pass_at_k_over(correct: Sequence[int], n: int, k: int) -> Interval:
    """Mean `pass_at_k` over problems, from how many of each problem's n samples are correct; k = 1: the accuracy.

    Percentile bootstrap over problems, since samples of one problem are alike; where all problems are solved always or
    never, and a bootstrap has no width, Wilson's interval over problems.
    """
    chances = [pass_at_k(count, n, k) for count in correct]
    if set(chances) <= {0.0} or set(chances) <= {1.0}:
        return wilson(int(sum(chances)), len(chances))
    return bootstrap_mean(chances)


async def majority_at_k(
    answers: Sequence[Sequence[str | None]],
    problems: Sequence[Problem],
    grader: Grader,
    *,
    k: int,
    draws: int = 50,
    seed: int = 0,
) -> Interval:
    """Accuracy of voting over k of each problem's answers, the mean over random draws; bootstrap over problems."""
    means = []
    for number, (given, problem) in enumerate(zip(answers, problems, strict=True)):
        if len(given) < k:
            raise ValueError(f"majority_at_k needs {k} answers, problem {problem.id!r} has {len(given)}")
        rng = random.Random(f"{seed}-{number}")
        right = 0
        for _ in range(draws if len(given) > k else 1):
            clusters = await grader.cluster(rng.sample(list(given), k))
            if clusters:
                right += (await grader.grade(clusters[0].answer, problem)).status == "correct"
        means.append(right / (draws if len(given) > k else 1))
    return bootstrap_mean(means)


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Chance that a right item scores higher than a wrong one, ties counting half; None without both kinds."""
    positives, negatives = sum(labels), len(labels) - sum(labels)
    if not positives or not negatives:
        return None
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    total, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        total += sum(labels[order[i]] for i in range(start, end)) * (start + end + 1) / 2
        start = end
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


@dataclass(frozen=True)
class Bin:
    """Items whose confidence lies in one range: what they promise on average, and how many hold it."""

    confidence: float
    accuracy: Interval


def reliability(scores: Sequence[float], labels: Sequence[bool], *, bins: int = 10) -> list[Bin]:
    """The reliability curve: equally wide bins of confidence 0 to 1, empty ones left out."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for score, label in zip(scores, labels, strict=True):
        groups.setdefault(min(int(score * bins), bins - 1), []).append((score, label))
    return [
        Bin(sum(s for s, _ in group) / len(group), wilson(sum(label for _, label in group), len(group)))
        for _, group in sorted(groups.items())
    ]


def flips(first: Sequence[bool], last: Sequence[bool]) -> tuple[int, int]:
    """How many problems went from wrong to correct, and how many from correct to wrong."""
    pairs = list(zip(first, last, strict=True))
    return sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
