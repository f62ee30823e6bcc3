"""GAD where everything can be computed: ten classes, a teacher with two modes, a student with one (Fig. 5 and §8.2).

The teacher is a mixture of two discretized Gaussians, the student one of them with mean and width to learn, the
discriminator a table with one score per class. Many starts run at once, as rows of the same tensors.

The paper gives neither weights, widths, starts, rates nor steps: those here are ours. What it shows holds from a narrow
start near a mode only. A student that starts wide, where SeqKD ends, stays there: that too is a local optimum of the
reverse KL. Against a frozen discriminator it always collapses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.seeds import derive_seed
from luthier.distill.objective import bradley_terry, group_advantages

CLASSES = torch.arange(10.0)
MODES, WIDTH, SHARES = (2.0, 7.0), 0.7, (0.6, 0.4)
VALLEY = (4, 5)


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """One way to train; rates are Adam's."""

    student_rate: float = 0.01
    """Learning rate of mean and log width."""
    discriminator_rate: float = 0.1
    """Learning rate of the scores."""
    steps: int = 1500
    """Updates of the student."""
    warmup: int = 200
    """Updates of the discriminator before the student's first."""
    frozen: bool = False
    """Whether the discriminator stops learning after the warm-up."""
    prompts: int = 64
    """Groups per update."""
    samples: int = 8
    """Student's draws per group, against one of the teacher."""
    seed: int = 0
    """Decides all draws."""


@dataclass(frozen=True)
class ToyResult:
    """Where R students ended, one number each, divergences in nats."""

    mean: Tensor
    width: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    valley: Tensor
    """Mass between the modes."""
    peak: Tensor
    """Largest probability of a class."""
    scores: Tensor
    """(R, 10): the discriminator's table."""


def teacher_probabilities() -> Tensor:
    """(10,)."""
    modes = student_log_probabilities(torch.tensor(MODES), torch.full((2,), WIDTH).log()).exp()
    return torch.tensor(SHARES) @ modes


def student_log_probabilities(mean: Tensor, log_width: Tensor) -> Tensor:
    """Discretized Gaussians: means and log widths (R,) -> (R, 10)."""
    distance = (CLASSES - mean[:, None]) / log_width.exp()[:, None]
    return F.log_softmax(-0.5 * distance**2, 1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def best_student(*, reverse: bool) -> tuple[float, float, float]:
    """Mean, width and divergence of the best student on a fine grid: by reverse KL the oracle, by forward KL SeqKD."""
    mean, log_width = torch.meshgrid(torch.linspace(0, 9, 181), torch.linspace(-1.2, 2, 161), indexing="ij")
    mean, log_width = mean.flatten(), log_width.flatten()
    log_p, log_q = teacher_probabilities().log(), student_log_probabilities(mean, log_width)
    values = divergence(log_q, log_p) if reverse else divergence(log_p, log_q)
    best = int(values.argmin())
    return float(mean[best]), float(log_width[best].exp()), float(values[best])


def train_toy(starts: Sequence[tuple[float, float]], settings: ToySettings) -> ToyResult:
    """Train a student from each start (mean, width) against a discriminator of its own."""
    mean = torch.tensor([start[0] for start in starts], requires_grad=True)
    log_width = torch.tensor([start[1] for start in starts]).log().requires_grad_()
    scores = torch.zeros(len(starts), len(CLASSES), requires_grad=True)
    student = torch.optim.Adam([mean, log_width], lr=settings.student_rate)
    discriminator = torch.optim.Adam([scores], lr=settings.discriminator_rate)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "toy"))
    for step in range(-settings.warmup, settings.steps):
        log_q = student_log_probabilities(mean, log_width)
        mine = _draw(log_q.detach().exp(), settings.prompts * settings.samples, generator)
        theirs = _draw(teacher_probabilities().expand(len(starts), -1), settings.prompts, generator)
        reward = scores.detach().gather(1, mine)  # before the discriminator learns from these draws
        if step < 0 or not settings.frozen:
            _step(discriminator, _discriminator_loss(scores, mine, theirs, settings.samples))
        if step >= 0:
            advantage = group_advantages(reward.flatten(), settings.samples).view_as(reward)
            _step(student, -(advantage * log_q.gather(1, mine)).mean(1).sum())
    return _result(mean.detach(), log_width.detach(), scores.detach())


def _draw(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(R, count) classes; each row of probabilities is drawn from on its own."""
    return torch.multinomial(probabilities, count, replacement=True, generator=generator)


def _discriminator_loss(scores: Tensor, mine: Tensor, theirs: Tensor, samples: int) -> Tensor:
    """Mean Bradley-Terry loss of each row, summed over rows, which have scores of their own."""
    owner = torch.arange(theirs.numel()).repeat_interleave(samples)
    loss = bradley_terry(scores.gather(1, mine).flatten(), scores.gather(1, theirs).flatten(), owner)
    return loss / mine.shape[1]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _result(mean: Tensor, log_width: Tensor, scores: Tensor) -> ToyResult:
    log_p, log_q = teacher_probabilities().log(), student_log_probabilities(mean, log_width)
    q = log_q.exp()
    return ToyResult(
        mean=mean,
        width=log_width.exp(),
        reverse_kl=divergence(log_q, log_p),
        forward_kl=divergence(log_p, log_q),
        valley=q[:, list(VALLEY)].sum(1),
        peak=q.max(1).values,
        scores=scores,
    )
