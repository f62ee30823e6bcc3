"""The angle gradient of the published code, which is wrong for angles other than 0: an ablation, never a default.

Exact, with (a, b) the values of a pair and (ga, gb) the gradients, all at the input of a round:  ∂L/∂θ = Σ ga·b − gb·a.
The published code (main branch, since v0.1.4) applies to these the formula for gradients at the round's output and gets
cos θ · (Σ ga·b − gb·a) − sin θ · Σ(ga·a + gb·b). The spurious term does not vanish with the signal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.quantize.rotation import channel_pairs, rotate


def reference_rotate(x: Tensor, pairs: Tensor, theta: Tensor, group_size: int) -> Tensor:
    """`rotate` of x (rows, in) with the published gradient of theta (K, in / 2); the gradient of x is exact."""
    out: Tensor = _ReferenceRotation.apply(x, pairs, theta, group_size)  # type: ignore[no-untyped-call]
    return out


class _ReferenceRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor, theta: Tensor, group_size: int) -> Tensor:
        y = rotate(x, pairs, theta, group_size=group_size)
        ctx.save_for_backward(y, pairs, theta)
        ctx.group_size = group_size
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        values, pairs, theta = ctx.saved_tensors
        grad_theta = torch.empty_like(theta)
        for r in reversed(range(len(theta))):
            one = slice(r, r + 1)
            values = rotate(values, pairs[one], theta[one], group_size=ctx.group_size, inverse=True)
            grad = rotate(grad, pairs[one], theta[one], group_size=ctx.group_size, inverse=True)
            i, j = channel_pairs(pairs[r], ctx.group_size)
            across = (grad[:, i] * values[:, j] - grad[:, j] * values[:, i]).sum(0)
            along = (grad[:, i] * values[:, i] + grad[:, j] * values[:, j]).sum(0)
            grad_theta[r] = across * theta[r].cos() - along * theta[r].sin()
        return grad, None, grad_theta, None
