"""Whether a warmed-up discriminator knows anything worth imitating: GAD starts only if it does (§8.4, §8.5).

On held-out prompts it has to beat classifiers that see length alone, or a bag of n-grams, by a margin that holds at the
low end of the interval. Where it does not, its score is a score of style, and the student would be trained on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.core.errors import UserError
from luthier.core.stats import Interval, bootstrap_mean, paired_difference
from luthier.distill.adversary import Adversary
from luthier.distill.baselines import CLASSIFIERS, Duel, fit
from luthier.distill.objective import pair_accuracy
from luthier.distill.replies import Duels

MARGIN = 0.05
FEWEST_PROMPTS = 30  # below, an interval from resampled prompts is too narrow to be believed


class Uninformative(UserError):
    """The discriminator does not beat what sees next to nothing."""


@dataclass(frozen=True)
class Gate:
    """Held-out accuracy of the discriminator, of each baseline, and its lead over each, with 95 % intervals."""

    accuracy: Interval
    baselines: Mapping[str, Interval]
    leads: Mapping[str, Interval]
    margin: float

    @property
    def is_open(self) -> bool:
        """Whether every lead is at least the margin, at the low end of its interval."""
        return self.accuracy.n >= FEWEST_PROMPTS and all(lead.low >= self.margin for lead in self.leads.values())

    def text(self) -> str:
        """One line: what was measured."""
        against = ", ".join(f"{name} {known.text()}" for name, known in self.baselines.items())
        return f"held-out accuracy {self.accuracy.text()} of {self.accuracy.n} prompts, against {against}"


def gate(wins: Sequence[float], baselines: Mapping[str, Sequence[float]], margin: float = MARGIN) -> Gate:
    """Compare shares of won pairs, one per held-out prompt, in the same order for all."""
    return Gate(
        accuracy=bootstrap_mean(wins),
        baselines={name: bootstrap_mean(others) for name, others in baselines.items()},
        leads={name: paired_difference(wins, others) for name, others in baselines.items()},
        margin=margin,
    )


def measure_gate(adversary: Adversary, train: Duels, held_out: Duels, margin: float = MARGIN) -> Gate:
    """The gate of a discriminator, with baselines fitted on the student's samples for training prompts."""
    wins = per_prompt(pair_accuracy(*adversary.scores(held_out), held_out.owner), held_out.owner)
    return gate(wins, baseline_wins(as_texts(train), as_texts(held_out)), margin)


def require_open(found: Gate, *, force: bool = False) -> None:
    """Uninformative when the gate is shut, unless `force`."""
    if found.is_open or force:
        return
    few = f"only {found.accuracy.n} held-out prompts, fewer than {FEWEST_PROMPTS}; " * (
        found.accuracy.n < FEWEST_PROMPTS
    )
    raise Uninformative(
        f"the discriminator does not lead by {found.margin}: {few}{found.text()}",
        hint="warm it up longer, give more teacher replies, or start all the same with force",
    )


def baseline_wins(train: Sequence[Duel], held_out: Sequence[Duel]) -> dict[str, list[float]]:
    """Shares of won pairs of each classifier that sees next to nothing, one per held-out prompt."""
    found = dict[str, list[float]]()
    for name, make in CLASSIFIERS.items():
        score = fit(train, make)
        found[name] = [_share(list(score(duel.teacher)), list(score(duel.student))) for duel in held_out]
    return found


def per_prompt(wins: Tensor, owner: Tensor) -> list[float]:
    """Means of pairs (N,) over the pairs of each teacher reply, in their order."""
    count = torch.bincount(owner)
    total = torch.zeros(len(count), dtype=torch.float64, device=wins.device).index_add(0, owner, wins.double())
    return (total / count).tolist()


def as_texts(duels: Duels) -> list[Duel]:
    """The same duels as `baselines` reads them: one for each teacher reply, as token ids."""
    owners = duels.owner.tolist()
    samples = [[reply for reply, owner in zip(duels.students, owners, strict=True) if owner == p] for p in set(owners)]
    return [Duel([teacher], mine) for teacher, mine in zip(duels.teachers, samples, strict=True)]


def _share(teacher: Sequence[float], student: Sequence[float]) -> float:
    """Share of pairs that the teacher's score wins; ties count a half."""
    won = [(a > b) + 0.5 * (a == b) for a in teacher for b in student]
    return float(sum(won)) / len(won)
