"""Section 5.2 of arXiv 2511.10628 as functions of tensors: N groups of G replies, B sequences, T tokens of a reply."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
LARGEST_KL = 10.0
LARGEST_EXPONENT = 20.0  # exp stays finite, and so does the gradient of what is cut off at LARGEST_KL


def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / (unbiased standard deviation of its group + 1e-6), for rewards [N, G].

    Exactly 0 in a group whose replies are all right or all wrong.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std(dim=1, keepdim=True) + EPSILON)


def informative(rewards: Tensor) -> Tensor:
    """Share of the groups of rewards [N, G] that have more than one reward: only these teach something."""
    return (rewards.amax(dim=1) > rewards.amin(dim=1)).float().mean()


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: tuple[float, float, float]) -> Tensor:
    """Clipped loss of each token [B, T]: max(-rho A, -clip(rho) A), and for A < 0 at most -c A (dual clip).

    logprobs, old [B, T]: log-probabilities (nats) of the sampled tokens, now and when they were sampled. advantages
    [B, 1]. clip: how far rho may fall below 1 and rise above it, and c.
    """
    low, high, dual = clip
    ratio = (logprobs - old).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy, reference) in each token [B, T], never negative: e^d - d - 1, at most 10.

    d = log-probability under the reference minus that under the policy.
    """
    difference = (reference - logprobs).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return (difference.exp() - difference - 1).clamp(-LARGEST_KL, LARGEST_KL)
