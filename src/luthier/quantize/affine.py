"""The uniform affine quantizer, asymmetric, by row and group (arXiv 2511.10645, section 3.3, after EfficientQAT).

Weights are (rows, groups, G); step sizes and zero points are (rows, groups, 1), in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-5
LARGEST_STEP = 1e5


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp; the gradient is that of the identity, outside the range too."""
    return x + (x.clamp(low, high) - x).detach()


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step sizes and float zero points min / step of the range of each group. Differentiable."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    extent = high - low
    step = (extent + (extent.clamp(min=SMALLEST_RANGE) - extent).detach()) / (2**bits - 1)
    return step, low / step


def fake_quantize(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest values of the grid, with straight-through gradients to weight, step and zero."""
    top = 2**bits - 1
    step = clamp_ste(step, SMALLEST_RANGE, LARGEST_STEP)
    point = clamp_ste(-round_ste(zero), 0, top)
    codes = clamp_ste(round_ste(weight / step) + point, 0, top)
    return (codes - point) * step


def zero_codes(zero: Tensor, bits: int) -> Tensor:
    """Float zero points as codes, uint8."""
    return (-zero.round()).clamp(0, 2**bits - 1).to(torch.uint8)


def encode(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes like weight, zero codes like zero), uint8: weight ≈ (codes − zero codes) · step."""
    points = zero_codes(zero, bits)
    step = step.clamp(SMALLEST_RANGE, LARGEST_STEP)
    return ((weight / step).round() + points).clamp(0, 2**bits - 1).to(torch.uint8), points


def decode(codes: Tensor, points: Tensor, step: Tensor) -> Tensor:
    """(codes − zero codes) · step, in the dtype of step."""
    return (codes.to(step.dtype) - points.to(step.dtype)) * step
