"""Where the channel scales start: between equal activations and equal weights, as AWQ searches them.

α = aᵖ / w¹⁻ᵖ for each channel, with a the size of its activation and w of its weights. A channel c times larger in the
weights and c times smaller in the activation gets α / c, so that every p is blind to outliers that a neighbouring
matrix has pushed over. (The form without w, also found under AWQ's name, is not.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.quantize.affine import fake_quantize, grid

STEPS = 20  # p = 0, 0.05, … 1
SMALLEST = 1e-4  # of the mean size: quieter channels count as this loud


def search_scales(weight: Tensor, hessian: Tensor, *, bits: int, group_size: int) -> Tensor:
    """The scales α (in,) with the smallest error E‖x(W − Ŵ)ᵀ‖² after rounding.

    weight (rows, in) and hessian (in, in), the sum of x xᵀ over the tokens, are padded to whole groups.
    """
    act, size = _floor(hessian.diagonal().clamp(min=0).sqrt()), _floor(weight.abs().mean(0))
    best, chosen = float("inf"), torch.ones_like(act)
    for p in (step / STEPS for step in range(STEPS + 1)):
        log = p * act.log() - (1 - p) * size.log()
        alpha = (log.view(-1, group_size) - log.view(-1, group_size).mean(1, keepdim=True)).exp().flatten()
        grouped = (weight * alpha).view(len(weight), -1, group_size)
        error = fake_quantize(grouped, *grid(grouped, bits), bits).view_as(weight) / alpha - weight
        loss = float(((error @ hessian) * error).sum())
        if loss < best:
            best, chosen = loss, alpha
    return chosen


def _floor(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=max(float(sizes.mean()) * SMALLEST, 1e-12))
