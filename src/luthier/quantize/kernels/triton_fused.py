# mypy: allow-untyped-defs
"""Rotation and product of one row in one kernel, in Triton. `gpu.py` calls this.

Every program rotates the whole row for its own outputs, so the tables of the rotation, 9 bytes a channel and round, are
read once for every OUTPUTS rows of the matrix: a launch is saved, and reads from the cache are paid for it. Which of
the two is dearer depends on the GPU; `gpu.linear` keeps them apart.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty

from luthier.quantize.kernels.triton_product import _halves
from luthier.quantize.kernels.triton_rotate import on

OUTPUTS = 16  # of one program: fewer read the tables too often, more leave processors idle


@triton.jit
def _fused_kernel(
    x,
    partner,
    cos,
    sin,
    scales,
    codes,
    points,
    steps,
    bias,
    y,
    outputs,
    groups,
    features,
    HALF: tl.constexpr,
    ROUNDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NIBBLES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One row of x (features,): scaled, rotated in registers and multiplied, group by group, all in fp32."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, HALF)
    out_mask = out < outputs
    wide: tl.constexpr = HALF if NIBBLES else 2 * HALF
    total = tl.zeros((OUTPUTS, HALF), dtype=tl.float32)
    for group in range(groups):
        columns = group * (2 * HALF) + tl.arange(0, 2 * HALF)
        tile = tl.load(x + columns, mask=columns < features, other=0.0).to(tl.float32)
        tile = (tile * tl.load(scales + columns).to(tl.float32))[None, :]
        for r in tl.static_range(ROUNDS):
            where = r * (groups * 2 * HALF) + columns
            swapped = tl.gather(tile, tl.load(partner + where).to(tl.int32)[None, :], 1)
            tile = tile * tl.load(cos + where)[None, :] + swapped * tl.load(sin + where)[None, :]
        x_low, x_high = tl.split(tl.trans(tl.reshape(tile, (2, HALF))))  # bytes hold channels b and b + HALF
        at = out.to(tl.int64) * groups + group
        low, high = _halves(codes, at[:, None] * wide + k[None, :], out_mask[:, None], HALF, NIBBLES)
        point = tl.load(points + at, mask=out_mask, other=0).to(tl.int32)[:, None]
        step = tl.load(steps + at, mask=out_mask, other=0.0).to(tl.float32)[:, None]
        part = (low - point).to(tl.float32) * x_low[None, :] + (high - point).to(tl.float32) * x_high[None, :]
        total += part * step
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias + out, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=out_mask)


def rotated_one(
    x: Tensor,
    rotation: tuple[Tensor, Tensor, Tensor, Tensor],
    packed: tuple[Tensor, Tensor, Tensor],
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """x (1, features), not rotated → (1, out); the rotated x is not rounded in between.

    rotation: partner, cos and signed sin (K, channels) and scales (channels,), as in `triton_rotate`; packed: codes,
    points and steps, as in `triton_product`.
    """
    outputs, groups = packed[1].shape
    x = x.contiguous()
    y = empty(1, outputs, dtype=x.dtype, device=x.device)
    with on(x.device):
        _fused_kernel[(triton.cdiv(outputs, OUTPUTS),)](
            *(x, *rotation, *packed, x if bias is None else bias, y),
            *(outputs, groups, x.shape[1]),
            HALF=group_size // 2,
            ROUNDS=rotation[0].shape[0],
            OUTPUTS=OUTPUTS,
            NIBBLES=bits <= 4,
            BIAS=bias is not None,
            num_warps=4,
        )
    return y
