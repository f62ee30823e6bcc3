"""From an encoder's numbers to a code of a few levels each. It costs m log2 n bits (`EemConfig.code_bits`).

Finite scalar quantization (FSQ, Mentzer et al. 2024): bound by tanh, round, pass the gradient straight through. The
noise mode is the published one: uniform noise in training, of one sign; a transmitted code needs a rounding, which
here is the lattice point inside the noise's reach, so that the decoder sees in use what it saw in training.

Departures from the paper: FSQ is the default, and in use the decoder never sees anything but a rounded value (theirs
keeps the noise on and sends floating-point numbers).

Shapes: B segments, m numbers, n levels. Codes are int64, 0 to n - 1; values are what the decoder is given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fsq_code(numbers: Tensor, levels: int) -> Tensor:
    """The code (B, m) of an encoder's numbers (B, m): round((n - 1) / 2 (tanh(x) + 1)), from 0 to n - 1."""
    return torch.round((torch.tanh(numbers.float()) + 1) * ((levels - 1) / 2)).long()


def fsq_values(code: Tensor, levels: int) -> Tensor:
    """What the decoder sees of a code: n equally spaced values from -1 to 1, float32."""
    return code.float() * (2 / (levels - 1)) - 1


def fsq_straight_through(numbers: Tensor, levels: int) -> Tensor:
    """Exactly `fsq_values(fsq_code(x))`, with the gradient of tanh(x)."""
    soft = torch.tanh(numbers.float())
    hard = fsq_values(fsq_code(numbers.detach(), levels), levels)
    return hard + (soft - soft.detach())


def noise_code(numbers: Tensor, levels: int, width: float) -> Tensor:
    """The code (B, m) of the lattice point in [x, x + width), clamped to n levels around zero."""
    return (torch.ceil(numbers.float() / width) + levels // 2).clamp(0, levels - 1).long()


def noise_values(code: Tensor, levels: int, width: float) -> Tensor:
    """What the decoder sees of such a code: a multiple of the width, float32."""
    return (code - levels // 2).float() * width


def with_noise(numbers: Tensor, uniform: Tensor, width: float) -> Tensor:
    """x + width U with U in [0, 1), the published training noise; it is never used to measure anything."""
    return numbers.float() + uniform * width


def replace_by_null(values: Tensor, null: Tensor, replaced: Tensor) -> Tensor:
    """Values (B, m), those of the segments in `replaced` (B,) bool exchanged for the learned null (m,)."""
    return torch.where(replaced[:, None], null.to(values.dtype), values)
