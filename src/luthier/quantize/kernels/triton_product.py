# mypy: allow-untyped-defs
"""Products with packed codes on a GPU, in Triton: for one row, for up to 16, and decoding for more.

Codes of a group of G channels: up to 4 bits, byte b holds channel b (low half) and channel b + G / 2 (high half); more,
a byte a code. (code − point) is a small integer, exact in bf16 and fp16, so zero points cost no accuracy; it is
multiplied by x, summed in fp32 and then multiplied by the step of its group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.quantize.kernels.triton_rotate import on

ROW_BYTES = 512  # of packed codes that one program reads of a matrix row at a time
ONE_OUTPUTS, FEW_OUTPUTS = 4, 16  # outputs of one program, for one row and for a few


@triton.jit
def _halves(codes, offsets, mask, HALF: tl.constexpr, NIBBLES: tl.constexpr):
    """The codes, int32, of the first and of the second half of the channels of groups."""
    first = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
    if NIBBLES:
        return first & 15, first >> 4
    else:
        return first, tl.load(codes + offsets + HALF, mask=mask, other=0).to(tl.int32)


@triton.jit
def _one_kernel(
    x,
    codes,
    points,
    steps,
    bias,
    y,
    outputs,
    groups,
    HALF: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    NIBBLES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One row of x: GROUPS groups of OUTPUTS matrix rows at a time."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, HALF)
    out_mask = out < outputs
    wide: tl.constexpr = HALF if NIBBLES else 2 * HALF
    total = tl.zeros((OUTPUTS, GROUPS, HALF), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = group < groups
        both = out_mask[:, None] & inside[None, :]
        at = out.to(tl.int64)[:, None] * groups + group[None, :]
        low, high = _halves(codes, at[:, :, None] * wide + k[None, None, :], both[:, :, None], HALF, NIBBLES)
        point = tl.load(points + at, mask=both, other=0).to(tl.int32)[:, :, None]
        step = tl.load(steps + at, mask=both, other=0.0).to(tl.float32)[:, :, None]
        where = group[:, None] * (2 * HALF) + k[None, :]
        x_low = tl.load(x + where, mask=inside[:, None], other=0.0).to(tl.float32)[None, :, :]
        x_high = tl.load(x + where + HALF, mask=inside[:, None], other=0.0).to(tl.float32)[None, :, :]
        total += ((low - point).to(tl.float32) * x_low + (high - point).to(tl.float32) * x_high) * step
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if BIAS:
        result += tl.load(bias + out, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=out_mask)


@triton.jit
def _few_kernel(
    x,
    codes,
    points,
    steps,
    bias,
    y,
    n_rows,
    outputs,
    groups,
    HALF: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NIBBLES: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in fp32: Triton's interpreter has no products of bf16
):
    """Up to 16 rows of x: a matrix product a group."""
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, 16)
    k = tl.arange(0, HALF)
    out_mask, row_mask = out < outputs, rows < n_rows
    wide: tl.constexpr = HALF if NIBBLES else 2 * HALF
    total = tl.zeros((16, OUTPUTS), dtype=tl.float32)
    for group in range(groups):
        at = out.to(tl.int64) * groups + group
        low, high = _halves(codes, at[None, :] * wide + k[:, None], out_mask[None, :], HALF, NIBBLES)
        point = tl.load(points + at, mask=out_mask, other=0).to(tl.int32)[None, :]
        step = tl.load(steps + at, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        where = rows[:, None] * (groups * 2 * HALF) + group * (2 * HALF) + k[None, :]
        x_low = tl.load(x + where, mask=row_mask[:, None], other=0.0)
        x_high = tl.load(x + where + HALF, mask=row_mask[:, None], other=0.0)
        if WIDEN:
            x_low, x_high = x_low.to(tl.float32), x_high.to(tl.float32)
        product = tl.dot(x_low, (low - point).to(x_low.dtype), input_precision=PRECISION)
        product = tl.dot(x_high, (high - point).to(x_low.dtype), product, input_precision=PRECISION)
        total += product * step
    if BIAS:
        total += tl.load(bias + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    offsets = rows.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=row_mask[:, None] & out_mask[None, :])


@triton.jit
def _decode_kernel(
    codes, points, steps, result, HALF: tl.constexpr, NIBBLES: tl.constexpr, count, GROUPS: tl.constexpr
):
    """GROUPS groups, counted through the whole matrix."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    mask = group < count
    k = tl.arange(0, HALF)
    wide: tl.constexpr = HALF if NIBBLES else 2 * HALF
    low, high = _halves(codes, group[:, None] * wide + k[None, :], mask[:, None], HALF, NIBBLES)
    point = tl.load(points + group, mask=mask, other=0).to(tl.int32)[:, None]
    step = tl.load(steps + group, mask=mask, other=0.0).to(tl.float32)[:, None]
    where = result + group[:, None] * (2 * HALF) + k[None, :]
    tl.store(where, ((low - point).to(tl.float32) * step).to(result.dtype.element_ty), mask=mask[:, None])
    tl.store(where + HALF, ((high - point).to(tl.float32) * step).to(result.dtype.element_ty), mask=mask[:, None])


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes (out, in) uint8 → uint8 (out, in / 2) for up to 4 bits, unchanged for more."""
    if bits > 4:
        return codes.contiguous()
    low, high = codes.view(codes.shape[0], -1, 2, group_size // 2).unbind(2)
    return (low | high << 4).flatten(1)


def few(x: Tensor, codes: Tensor, points: Tensor, steps: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Rotated x (1 to 16 rows, in) → (rows, out): codes (out, …) as of `pack`, points and steps (out, in / G)."""
    rows, channels = x.shape
    outputs, groups = points.shape
    half = channels // groups // 2
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    shared = {"HALF": half, "NIBBLES": bits <= 4, "BIAS": bias is not None}
    tensors = (x.contiguous(), codes, points, steps, x if bias is None else bias, y)
    with on(x.device):
        if rows == 1:
            at_once = min(triton.next_power_of_2(groups), ROW_BYTES // half)
            grid = (triton.cdiv(outputs, ONE_OUTPUTS),)
            _one_kernel[grid](*tensors, outputs, groups, OUTPUTS=ONE_OUTPUTS, GROUPS=at_once, num_warps=4, **shared)
        else:
            precision = "ieee" if x.dtype == torch.float32 else "tf32"
            grid = (triton.cdiv(outputs, FEW_OUTPUTS),)
            _few_kernel[grid](
                *(*tensors, rows, outputs, groups),
                OUTPUTS=FEW_OUTPUTS,
                PRECISION=precision,
                WIDEN=not x.is_cuda,
                num_warps=4 if precision == "ieee" else 2,
                **shared,
            )
    return y


def decoded(codes: Tensor, points: Tensor, steps: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in the rotated basis: (code − point) · step in fp32, then rounded to `dtype`."""
    outputs, groups = points.shape
    result = torch.empty(outputs, groups * group_size, dtype=dtype, device=codes.device)
    at_once = 2048 // group_size
    with on(codes.device):
        _decode_kernel[(triton.cdiv(points.numel(), at_once),)](
            *(codes, points, steps, result),
            HALF=group_size // 2,
            NIBBLES=bits <= 4,
            count=points.numel(),
            GROUPS=at_once,
            num_warps=4,
        )
    return result
