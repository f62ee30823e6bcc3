"""What a discriminator and an adversarially trained student have to beat. Loads no torch.

- Classifiers that see next to nothing: the length of a reply, or a bag of its n-grams. Where they tell teacher from
  student as well as the discriminator does, it is a detector of style and its reward is style (§7.4).
- A student that was only fine-tuned, at a lower temperature, or at its best of N: both cost no training.
- DPO on the teacher's replies against the student's: `teacher.preferences`.

A reply is a sequence of tokens, of whatever tokenizer; give its end as a token too, where replies may be cut off.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from luthier.core.stats import Interval
from luthier.distill.metrics import clustered_accuracy, length_edges
from luthier.llm.types import Backend, Completion, Request

Floats = npt.NDArray[np.float64]
Reply = Sequence[Hashable]
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Duel:
    """Replies of teacher and student to one prompt: every pair of one of each is compared."""

    teacher: Sequence[Reply]
    student: Sequence[Reply]


class LengthFeatures:
    """Everything about a reply's length that a linear score can use: the length, its logarithm, and its bin."""

    def __init__(self, replies: Sequence[Reply], bins: int = 8) -> None:
        self._edges = length_edges([len(reply) for reply in replies], bins)

    def __call__(self, replies: Sequence[Reply]) -> Floats:
        """(replies, 2 + bins)."""
        lengths = np.array([len(reply) for reply in replies], float)
        inside = np.digitize(lengths, self._edges)[:, None] == np.arange(len(self._edges) + 1)
        return np.column_stack([lengths, np.log1p(lengths), inside])


class NgramFeatures:
    """How often a reply has each of the most frequent n-grams of some replies, with n from 1 to `order`.

    Counts and not shares, so that all that length tells is in them too.
    """

    def __init__(self, replies: Sequence[Reply], order: int = 2, size: int = 2000) -> None:
        self._order = order
        counts = Counter(gram for reply in replies for gram in self._grams(reply))
        self._place = {gram: place for place, (gram, _) in enumerate(counts.most_common(size))}

    def __call__(self, replies: Sequence[Reply]) -> Floats:
        """(replies, n-grams)."""
        features = np.zeros((len(replies), len(self._place)))
        for row, reply in enumerate(replies):
            for gram in self._grams(reply):
                if (place := self._place.get(gram)) is not None:
                    features[row, place] += 1
        return features

    def _grams(self, reply: Reply) -> list[tuple[Hashable, ...]]:
        sizes = range(1, self._order + 1)
        return [tuple(reply[start : start + n]) for n in sizes for start in range(len(reply) - n + 1)]


Features = Callable[[Sequence[Reply]], Floats]
MakeFeatures = Callable[[Sequence[Reply]], Features]
CLASSIFIERS: dict[str, MakeFeatures] = {"length": LengthFeatures, "n-grams": NgramFeatures}


@dataclass(frozen=True)
class LinearScorer:
    """A score of replies, higher for what looks like the teacher's: weights (features,) on scaled features."""

    features: Features
    scale: Floats
    weights: Floats

    def __call__(self, replies: Sequence[Reply]) -> Floats:
        """(replies,) scores."""
        scores: Floats = self.features(replies) / self.scale @ self.weights
        return scores


def fit(duels: Sequence[Duel], make: MakeFeatures, penalty: float = 1e-3) -> LinearScorer:
    """A pairwise logistic regression on all pairs of `duels`, with features chosen by `make` from all replies."""
    teacher, student = _pairs(duels)
    features = make([*teacher, *student])
    ours, theirs = features(teacher), features(student)
    spread = np.concatenate([ours, theirs]).std(0)
    scale = np.where(spread > 0, spread, 1.0)
    return LinearScorer(features, scale, bradley_terry((ours - theirs) / scale, penalty))


def bradley_terry(differences: Floats, penalty: float = 1e-3, steps: int = 2000) -> Floats:
    """(features,) weights w that minimize mean(-ln sigmoid(w · d)) + penalty/2 |w|², d the rows of `differences`.

    The loss of the discriminator (Eq. 8) with a linear score, where a constant cancels. Accelerated gradient descent
    (Nesterov 1983) with the step that the curvature allows; it ends when the gradient is below 1e-6.
    """
    count, size = differences.shape
    curvature = np.linalg.norm(differences, 2) ** 2 / (4 * count) + penalty
    momentum = (1 - (penalty / curvature) ** 0.5) / (1 + (penalty / curvature) ** 0.5)
    weights, before = np.zeros(size), np.zeros(size)
    for _ in range(steps):
        ahead = weights + momentum * (weights - before)
        doubt = 0.5 * (1 - np.tanh(0.5 * differences @ ahead))  # sigmoid(-w·d)
        gradient = penalty * ahead - differences.T @ doubt / count
        weights, before = ahead - gradient / curvature, weights
        if np.abs(gradient).max() < 1e-6:
            break
    return weights


def held_out_accuracy(score: Callable[[Sequence[Reply]], Sequence[float] | Floats], duels: Sequence[Duel]) -> Interval:
    """How often the teacher's reply scores higher on prompts that `score` was not fitted on; bootstrap over prompts."""
    return clustered_accuracy(
        [list(score(duel.teacher)) for duel in duels], [list(score(duel.student)) for duel in duels]
    )


def baseline_accuracies(train: Sequence[Duel], held_out: Sequence[Duel]) -> dict[str, Interval]:
    """Held-out accuracy of every classifier of CLASSIFIERS: what a discriminator must clearly exceed (§8.5, gate)."""
    return {name: held_out_accuracy(fit(train, make), held_out) for name, make in CLASSIFIERS.items()}


def _pairs(duels: Sequence[Duel]) -> tuple[list[Reply], list[Reply]]:
    """Teacher and student replies, pair by pair."""
    pairs = [(ours, theirs) for duel in duels for ours in duel.teacher for theirs in duel.student]
    if not pairs:
        raise ValueError("a classifier needs pairs of replies, got none")
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def best_of_n(
    candidates: Sequence[Sequence[Candidate]], score: Callable[[Sequence[Candidate]], Sequence[float] | Floats]
) -> list[Candidate]:
    """Of the candidates for each prompt the one with the highest score; the first of equals."""
    return [group[int(np.argmax(score(group)))] for group in candidates]


async def sweep(
    backend: Backend, requests: Sequence[Request], temperatures: Sequence[float], at_once: int = 16
) -> dict[float, list[list[Completion]]]:
    """The samples of every request at each temperature. Raises: EndpointError when a call fails.

    The control that any trained student has to beat: it costs nothing. Choose on validation prompts, then measure on
    others (`best_temperature`).
    """
    slots = asyncio.Semaphore(at_once)

    async def ask(request: Request, temperature: float) -> list[Completion]:
        async with slots:
            return await backend.complete(replace(request, temperature=temperature))

    found: dict[float, list[list[Completion]]] = {}
    for temperature in temperatures:
        found[temperature] = list(await asyncio.gather(*(ask(request, temperature) for request in requests)))
    return found


def best_temperature(quality: dict[float, float | None]) -> float:
    """The temperature of highest quality; a None, such as of an undefined `matched_mean`, does not count.

    Raises: ValueError when all are None.
    """
    known = {temperature: value for temperature, value in quality.items() if value is not None}
    if not known:
        raise ValueError("no temperature has a known quality")
    return max(known, key=lambda temperature: known[temperature])
