"""Rotation and products with quantized weights on a GPU: packs a matrix once, chooses the kernel by rows.

Needs Triton, which comes with torch's CUDA builds; its kernels are in `triton_rotate.py`, `triton_product.py` and
`triton_fused.py`. With
TRITON_INTERPRET=1 in the environment before Triton is loaded they run on a CPU, slowly, as the tests do.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from luthier.quantize.rotation import channel_pairs
from luthier.quantize.weights import QuantizedWeight

MAX_FEW_ROWS = 16  # rows up to which codes are multiplied as they are; for more, the matrix is decoded for the call
MIN_BLOCK_ROWS = 1024  # rows from which rotating by dense blocks pays for making the blocks


@dataclass(frozen=True, kw_only=True)
class GpuWeight:
    """Matrices (out together, in) with one transform, packed for the kernels here.

    codes (out, in / 2) uint8, or (out, in) for more than 4 bits; points (out, in / G) uint8; steps (out, in / G) fp16;
    partner (K, in) uint8, cos and sin (K, in) fp32, by channel: the other one of its pair, within the group, and the
    factors of both, the sine with its sign; channel_scales (in,) fp16. `in` is padded to whole groups,
    in_features is not.
    """

    codes: Tensor
    points: Tensor
    steps: Tensor
    partner: Tensor
    cos: Tensor
    sin: Tensor
    channel_scales: Tensor
    bits: int
    group_size: int
    in_features: int

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        tensors = (self.codes, self.points, self.steps, self.partner, self.cos, self.sin, self.channel_scales)
        return sum(tensor.nbytes for tensor in tensors)


def available() -> bool:
    """Whether the kernels can run: Triton is there, and a GPU or Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.util.find_spec("triton") is not None and (interpreted or torch.cuda.is_available())


def prepare(weight: QuantizedWeight, device: torch.device | str, siblings: Sequence[QuantizedWeight] = ()) -> GpuWeight:
    """Pack a matrix, with siblings of the same transform below it, on `device`.

    ValueError when siblings differ in transform, width or shape, or the group size is not 32, 64 or 128.
    """
    from luthier.quantize.kernels.triton_product import pack

    if weight.group_size not in (32, 64, 128):
        raise ValueError(f"GPU kernels take groups of 32, 64 or 128 channels, got {weight.group_size}")
    weights = (weight, *siblings)
    for other in siblings:
        same = all(torch.equal(a, b) for a, b in zip(weight.transform(), other.transform(), strict=True))
        if not same or (other.bits, other.group_size) != (weight.bits, weight.group_size):
            raise ValueError("matrices packed together must have the same transform, bits and group size")
    partner, cos, sin = _by_channel(weight)
    return GpuWeight(
        codes=torch.cat([pack(w.codes.to(device), w.bits, w.group_size) for w in weights]),
        points=torch.cat([w.points.to(device) for w in weights]),
        steps=torch.cat([w.steps.to(device, torch.float16) for w in weights]),
        partner=partner.to(device),
        cos=cos.to(device),
        sin=sin.to(device),
        channel_scales=weight.channel_scales.to(device, torch.float16).contiguous(),
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
    )


def _by_channel(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(partner uint8, cos, signed sin), each (K, in), of every channel in every round."""
    i, j = channel_pairs(weight.pairs, weight.group_size)
    where = torch.cat([i, j], 1)
    cos, sin = weight.theta.float().cos(), weight.theta.float().sin()
    places = [
        torch.empty(where.shape, dtype=dtype, device=where.device) for dtype in (torch.uint8, cos.dtype, cos.dtype)
    ]
    values = ((torch.cat([j, i], 1) % weight.group_size).byte(), torch.cat([cos, cos], 1), torch.cat([sin, -sin], 1))
    partner, by_cos, by_sin = (place.scatter_(1, where, value) for place, value in zip(places, values, strict=True))
    return partner, by_cos, by_sin


def rotate(x: Tensor, weight: GpuWeight) -> Tensor:
    """x (rows, in_features or in) → (rows, in) in the dtype of x: scaled and rotated, computed in fp32.

    ValueError for another shape.
    """
    return _transform(x, weight, None, 0.0)


def rms_norm_rotate(x: Tensor, norm_weight: Tensor, eps: float, weight: GpuWeight) -> Tensor:
    """As `rotate`, of x / √(mean of squares + eps) · norm_weight (in_features,).

    The normalized x is not rounded to its dtype in between, as it is where norm and rotation are apart.
    """
    return _transform(x[:, : weight.in_features], weight, norm_weight.contiguous(), eps)


def multiply(x: Tensor, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """Rotated x (rows, in) → (rows, out) + bias (out,), accumulated in fp32. ValueError for another shape."""
    from luthier.quantize.kernels import triton_product

    packed = (weight.codes, weight.points, weight.steps, weight.bits)
    if x.dim() != 2 or x.shape[1] != weight.partner.shape[1]:
        raise ValueError(f"expected rotated x of (rows, {weight.partner.shape[1]}), got {tuple(x.shape)}")
    if 0 < x.shape[0] <= MAX_FEW_ROWS:
        return triton_product.few(x, *packed, bias)
    matrix = triton_product.decoded(*packed, weight.group_size, x.dtype)
    return dense_linear(x, matrix, None if bias is None else bias.to(x.dtype))


def linear(x: Tensor, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """x (rows, in_features or in) → (rows, out): `rotate`, then `multiply`."""
    return multiply(rotate(x, weight), weight, bias)


def linear_at_once(x: Tensor, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """As `linear` in one launch instead of two, for one row: x (1, in_features or in) → (1, out).

    Not what modules use: it repeats the rotation for every few outputs, and no GPU has shown yet that this is cheaper.
    ValueError for another shape.
    """
    from luthier.quantize.kernels.triton_fused import rotated_one

    if x.dim() != 2 or x.shape[0] != 1 or x.shape[1] not in (weight.in_features, weight.partner.shape[1]):
        raise ValueError(f"expected x of (1, {weight.in_features}), got {tuple(x.shape)}")
    rotation = (weight.partner, weight.cos, weight.sin, weight.channel_scales)
    packed = (weight.codes, weight.points, weight.steps)
    return rotated_one(x, rotation, packed, weight.bits, weight.group_size, bias)


def _transform(x: Tensor, weight: GpuWeight, norm: Tensor | None, eps: float) -> Tensor:
    from luthier.quantize.kernels import triton_rotate

    channels = weight.partner.shape[1]
    if x.dim() != 2 or x.shape[1] not in (weight.in_features, channels):
        raise ValueError(f"expected x of (rows, {weight.in_features}), got {tuple(x.shape)}")
    if x.shape[0] == 0:
        return x.new_empty(0, channels)
    dense = x.shape[0] >= MIN_BLOCK_ROWS and x.dtype != torch.float32  # its products are not exact enough for fp32
    form = triton_rotate.by_blocks if dense else triton_rotate.by_rounds
    x = x if x.stride(1) == 1 else x.contiguous()
    tables = (weight.partner, weight.cos, weight.sin, weight.channel_scales)
    return form(x, *tables, weight.group_size, norm, eps)
