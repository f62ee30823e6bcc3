"""Scaled pairwise rotation: K rounds of independent Givens rotations within groups (arXiv 2511.10645, Eq. 2 to 4).

`rotate` is the definition and the oracle of every kernel. `block_matrices` multiplies the rounds of each group into one
dense matrix, which turns a transform into a matrix product; training and the CPU kernel use that form.

Departure: the sign of the angles is that of the authors' kernels and checkpoints, the opposite of the paper's text.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, pairs: Tensor, theta: Tensor, *, group_size: int, inverse: bool = False) -> Tensor:
    """Rotate the last dimension of x (…, in) by K rounds: pairs (K, in) local channels, theta (K, in / 2) radians.

    One round, for the pair (i, j): new[i] = cos θ · x[i] + sin θ · x[j], new[j] = cos θ · x[j] − sin θ · x[i].
    `inverse` undoes it: rounds in reverse order with negated angles. Computes in the wider of the two dtypes.
    """
    order = range(len(theta))
    for r in reversed(order) if inverse else order:
        partner, cos, sin = _round(pairs[r], -theta[r] if inverse else theta[r], group_size)
        x = x * cos + x[..., partner] * sin
    return x


def _round(pairs: Tensor, theta: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One round as y = x · cos + x[partner] · sin, with partner, cos and signed sin (in,) by channel."""
    i, j = channel_pairs(pairs, group_size)
    where = torch.cat([i, j])
    partner = torch.empty_like(where).scatter_(0, where, torch.cat([j, i]))
    back = torch.empty_like(where).scatter_(0, where, torch.arange(len(where), device=where.device))
    cos, sin = theta.cos(), theta.sin()
    return partner, torch.cat([cos, cos])[back], torch.cat([sin, -sin])[back]


def channel_pairs(pairs: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The channels (i, j), each (…, in / 2) and counted over all groups, of pairs (…, in) of local channels."""
    channels = pairs.shape[-1]
    start = torch.arange(channels // 2, device=pairs.device) // (group_size // 2) * group_size
    return pairs[..., 0::2].long() + start, pairs[..., 1::2].long() + start


def block_matrices(pairs: Tensor, theta: Tensor, *, group_size: int) -> Tensor:
    """All rounds as one matrix a group, (in / G, G, G): `rotate(x)` of group g is x_g @ matrix[g]. Differentiable."""
    channels = pairs.shape[1]
    groups = channels // group_size
    identity = torch.eye(group_size, dtype=theta.dtype, device=theta.device)
    rows = rotate(identity.repeat(1, groups), pairs, theta, group_size=group_size)  # (G, in): row i of every group
    return rows.view(group_size, groups, group_size).transpose(0, 1)


def apply_blocks(x: Tensor, matrices: Tensor) -> Tensor:
    """x (rows, in) times the block-diagonal matrices (in / G, G, G)."""
    rows, groups, size = x.shape[0], *matrices.shape[:2]
    grouped = x.view(rows, groups, size).transpose(0, 1)
    return torch.bmm(grouped, matrices).transpose(0, 1).reshape(rows, groups * size)
