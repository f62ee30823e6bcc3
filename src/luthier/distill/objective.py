"""The mathematics of GAD, arXiv 2511.10643: what the discriminator minimizes, and what its scores are turned into.

Tensors in, tensors out. N student replies meet P <= N teacher replies; `owner` (N,) says which one each meets, so a
teacher reply that is sampled against N times is scored once and not N times as in the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    student: Tensor,
    teacher: Tensor,
    owner: Tensor,
    *,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Summed -log sigma(D(teacher) - D(student)) over pairs, in nats: student (N,), teacher (P,), owner (N,) -> ().

    `weights` (N,) counts pairs, all once by default. `smoothing` is the probability that a pair is labelled the wrong
    way round. `centering` weighs (D(teacher) + D(student))^2, which keeps scores around zero and changes no order.
    """
    opponent = teacher[owner]
    margin = opponent - student
    loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)  # Eq. 8
    loss = loss + centering * (opponent + student) ** 2
    return (loss if weights is None else loss * weights).sum()


def pair_accuracy(student: Tensor, teacher: Tensor, owner: Tensor) -> Tensor:
    """1 where D ranks the teacher's reply above the student's, a half for a tie, else 0: (N,)."""
    margin = teacher[owner] - student
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def length_matched(student_lengths: Tensor, teacher_lengths: Tensor, owner: Tensor, tolerance: float) -> Tensor:
    """1 for pairs whose lengths in tokens differ by at most `tolerance` in |ln ratio|, else 0: (N,)."""
    ratio = student_lengths.float() / teacher_lengths[owner].float()
    return (ratio.log().abs() <= tolerance).float()


def length_reward(student_lengths: Tensor, teacher_lengths: Tensor) -> Tensor:
    """-|ln(student / teacher)| of lengths in tokens, both (N,): the reward of an arm that knows length alone."""
    return -(student_lengths.float() / teacher_lengths.float()).log().abs()


def centred(values: Tensor, group_size: int) -> Tensor:
    """Each value minus the mean of its group of `group_size` neighbours; (N,) -> (N,)."""
    groups = values.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def length_residual(rewards: Tensor, lengths: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rewards (N,) without what log length explains inside groups, and the share of variance that it explained, ().

    One slope for the batch, fitted on values centred in their group: only differences inside a group become advantages.
    The share is 0 where lengths or rewards do not vary.
    """
    y, x = centred(rewards, group_size), centred(lengths.float().log(), group_size)
    power = (x * x).sum()
    slope = torch.where(power > 0, (x * y).sum() / power.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
    total = (y * y).sum()
    explained = torch.where(total > 0, (slope * slope * power) / total.clamp(min=torch.finfo(y.dtype).tiny), 0.0)
    return rewards - slope * x, explained


def informative_groups(rewards: Tensor, group_size: int, smallest_std: float) -> Tensor:
    """Whether a group's rewards differ by more than noise, for each reward: (N,) -> (N,) bool.

    Dividing by a standard deviation near zero would blow rounding noise up to advantages of one.
    """
    spread = rewards.view(-1, group_size).std(1)  # unbiased, as in GRPO
    return (spread > smallest_std).repeat_interleave(group_size)


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) inside each group, unbiased std; (N,) -> (N,). The oracle of what the trainer does."""
    spread = rewards.view(-1, group_size).std(1).repeat_interleave(group_size)  # Eq. 6
    return centred(rewards, group_size) / (spread + eps)


def token_moments(rises: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the values (N, T) that `mask` (N, T) counts: (N, 3)."""
    counted = torch.where(mask, rises, 0.0)
    return torch.stack([mask.sum(1).to(rises.dtype), counted.sum(1), (counted * counted).sum(1)], 1)


def token_advantages(rises: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) over all tokens of a reply's group, biased std; 0 outside of `mask`. (N, T) -> (N, T).

    rises: what a score rises by at each token. moments (N, 3): `token_moments` summed over the group of each reply.
    """
    count, total, squares = moments.T[:, :, None]
    mean = total / count
    spread = (squares / count - mean * mean).clamp(min=0).sqrt()
    return torch.where(mask, (rises - mean) / (spread + eps), 0.0)


def next_discriminator_steps(steps: int, accuracy: float, band: tuple[float, float], most: int) -> int:
    """Updates of D per rollout after a held-out accuracy: one more below the band, one fewer above, 1 to `most`.

    A lagging discriminator is the failure that GAD collapses by (frozen, its best reply is one point); one that is
    always right tells the student nothing.
    """
    low, high = band
    return min(most, max(1, steps + (accuracy < low) - (accuracy > high)))
