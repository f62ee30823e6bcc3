# mypy: allow-untyped-defs
"""Scaled pairwise rotation on a GPU, optionally of an RMS-normalized input, in Triton. `gpu.py` calls this.

One program turns some rows of one group, all rounds of it in registers: a round is y = x · cos θ + x[partner] · sin θ,
with partner, cosine and signed sine stored for every channel: computing them here would cost a decoding step more time
than reading them. Tile and tables are fp32, so the only rounding in the dtype of x is that of the result.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # rows of one program of `_rotate`
NORM_HERE = 16  # up to so many rows, every program measures the norm of its rows itself, which saves a launch


@triton.jit
def _load(x, scales, norm, inverse_rms, rows, columns, row_mask, features, stride, NORM: tl.constexpr):
    """x · channel scale, and with NORM · norm weight / rms: fp32 (rows, columns), zero where there is no input."""
    inside = columns < features
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tile = tl.load(x + offsets, mask=row_mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if NORM:
        tile *= inverse_rms[:, None] * tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tile * tl.load(scales + columns).to(tl.float32)[None, :]


@triton.jit
def _inverse_rms(x, rows, row_mask, features, stride, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """1 / √(mean of squares + eps) of every row: fp32 (rows,)."""
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        part = tl.load(x + offsets, mask=row_mask[:, None] & (columns < features)[None, :], other=0.0).to(tl.float32)
        squares += part * part
    return 1.0 / tl.sqrt(tl.sum(squares, axis=1) / features + eps)


@triton.jit
def _rms_kernel(x, result, n_rows, features, stride, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    tl.store(result + rows, _inverse_rms(x, rows, row_mask, features, stride, eps, BLOCK, ROWS), mask=row_mask)


@triton.jit
def _rotate_kernel(
    x,
    y,
    partner,
    cos,
    sin,
    scales,
    norm,
    rms,
    n_rows,
    features,
    stride,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,  # 0: none; 1: `rms` holds 1 / rms of every row; 2: measured here
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    row_mask = rows < n_rows
    inverse_rms = tl.zeros((ROWS,), dtype=tl.float32)
    if NORM == 1:
        inverse_rms = tl.load(rms + rows, mask=row_mask, other=0.0)
    if NORM == 2:
        inverse_rms = _inverse_rms(x, rows, row_mask, features, stride, eps, 1024, ROWS)
    tile = _load(x, scales, norm, inverse_rms, rows, columns, row_mask, features, stride, NORM)
    for r in tl.static_range(ROUNDS):
        other = tl.load(partner + r * CHANNELS + columns).to(tl.int32)
        cosine = tl.load(cos + r * CHANNELS + columns)[None, :]
        sine = tl.load(sin + r * CHANNELS + columns)[None, :]
        swapped = tl.gather(tile, tl.broadcast_to(other[None, :], (ROWS, GROUP)), 1)
        tile = tile * cosine + swapped * sine
    offsets = rows.to(tl.int64)[:, None] * CHANNELS + columns[None, :]
    tl.store(y + offsets, tile.to(y.dtype.element_ty), mask=row_mask[:, None])


@triton.jit
def _blocks_kernel(
    x,
    y,
    blocks,
    scales,
    norm,
    rms,
    n_rows,
    features,
    stride,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The rows of one group times its dense matrix; `blocks` (GROUP, CHANNELS) fp32: row i is that of channel i."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * GROUP
    row_mask = rows < n_rows
    inverse_rms = tl.zeros((ROWS,), dtype=tl.float32)
    if NORM:
        inverse_rms = tl.load(rms + rows, mask=row_mask, other=0.0)
    total = tl.zeros((ROWS, GROUP), dtype=tl.float32)
    outputs = first + tl.arange(0, GROUP)
    for start in range(0, GROUP, 32):
        inputs = start + tl.arange(0, 32)
        part = _load(x, scales, norm, inverse_rms, rows, first + inputs, row_mask, features, stride, NORM)
        matrix = tl.load(blocks + inputs[:, None] * CHANNELS + outputs[None, :])
        total = tl.dot(part, matrix, total, input_precision="tf32")
    offsets = rows.to(tl.int64)[:, None] * CHANNELS + outputs[None, :]
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=row_mask[:, None])


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the GPU of a tensor the one on which kernels start."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def by_rounds(
    x: Tensor,
    partner: Tensor,
    cos: Tensor,
    sin: Tensor,
    scales: Tensor,
    group_size: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """x (rows, at most channels) → (rows, channels) in the dtype of x, round by round; best for few rows.

    partner (K, channels) uint8 within the group; cos and signed sin (K, channels) fp32; scales (channels,). With `norm`
    (features,), x is first divided by its root mean square and multiplied by `norm`.
    """
    rows, channels = x.shape[0], partner.shape[1]
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    mode = 0 if norm is None else 2 if rows <= NORM_HERE else 1
    rms = inverse_rms(x, eps) if mode == 1 else x
    tile = min(ROWS, triton.next_power_of_2(rows))
    with on(x.device):
        _rotate_kernel[(triton.cdiv(rows, tile), channels // group_size)](
            *(x, y, partner, cos, sin, scales, x if norm is None else norm, rms),
            *(rows, x.shape[1], x.stride(0), eps),
            CHANNELS=channels,
            GROUP=group_size,
            ROUNDS=partner.shape[0],
            ROWS=tile,
            NORM=mode,
            num_warps=1 if tile * group_size <= 256 else 2,
        )
    return y


def by_blocks(
    x: Tensor,
    partner: Tensor,
    cos: Tensor,
    sin: Tensor,
    scales: Tensor,
    group_size: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """As `by_rounds`, by one matrix product a group; best for many rows.

    The matrices are made for every call, by rotating the identity, and take 4 · group_size · channels bytes meanwhile.
    Products run in TF32, which is finer than the rounding of a bf16 or fp16 result, but not than that of fp32.
    """
    rows, channels = x.shape[0], partner.shape[1]
    identity = torch.eye(group_size, device=x.device).repeat(1, channels // group_size)
    blocks = by_rounds(identity, partner, cos, sin, torch.ones_like(scales), group_size)
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    rms = x if norm is None else inverse_rms(x, eps)
    with on(x.device):
        _blocks_kernel[(triton.cdiv(rows, 64), channels // group_size)](
            *(x, y, blocks, scales, x if norm is None else norm, rms),
            *(rows, x.shape[1], x.stride(0)),
            CHANNELS=channels,
            GROUP=group_size,
            ROWS=64,
            NORM=norm is not None,
            num_warps=4,
        )
    return y


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean of squares + eps) of every row of x (rows, features), fp32 (rows,)."""
    result = torch.empty(x.shape[0], device=x.device)
    with on(x.device):
        _rms_kernel[(triton.cdiv(x.shape[0], 4),)](x, result, *x.shape, x.stride(0), eps, BLOCK=1024, ROWS=4)
    return result
