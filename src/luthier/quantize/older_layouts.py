"""Readers for the two layouts that ParoQuant checkpoints had before the present one. Both are 4-bit.

Names are `P.qlinear.*` for codes and grid and `P.rotation.{theta, pairs, channel_scales}`. The intermediate layout has
the present one's tensors. The native one, of the paper's own engine, has codes in four-row tiles, int16 (out / 4, in),
and `scaled_zeros` = −step · zero code; its scales have rows of padding beyond in / G.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.quantize.packing import AWQ_ORDER, unpack
from luthier.quantize.tensors import MATRIX, TRANSFORM, Header, check_headers, check_values, headers_of
from luthier.quantize.weights import QuantizedWeight

BITS = 4
CODES, ROTATION = ".qlinear", ".rotation"
SUFFIXES = tuple(f"{CODES}.{part}" for part in (*MATRIX, "scaled_zeros")) + tuple(
    f"{ROTATION}.{part}" for part in TRANSFORM
)
TILE_ROWS, TILE_COLUMNS = 4, 64
FARTHEST_ZERO = 0.1  # scaled_zeros are fp16 products: zero codes come back within 15 · 2⁻¹⁰


def owner(name: str) -> str | None:
    """The matrix that a tensor of an older layout is a part of, None for other tensors."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def present_name(name: str) -> str:
    """The name that a tensor which is not quantized has today: biases were beside the codes."""
    return name.removesuffix(f"{CODES}.bias") + ".bias" if name.endswith(f"{CODES}.bias") else name


def is_older(name: str, tensors: Mapping[str, object]) -> bool:
    """Whether the matrix `name` is stored in one of these layouts."""
    return f"{name}{CODES}.qweight" in tensors


def read(name: str, tensors: Mapping[str, Tensor], group_size: int) -> QuantizedWeight:
    """The matrix `name`; CheckpointError when its tensors are missing or do not fit."""
    prefix = f"{name}{CODES}"
    needed = [f"{prefix}.scales", *(f"{name}{ROTATION}.{part}" for part in TRANSFORM)]
    qweight = tensors[f"{prefix}.qweight"]
    native = qweight.dtype == torch.int16
    needed.append(f"{prefix}.{'scaled_zeros' if native else 'qzeros'}")
    for key in needed:
        if key not in tensors:
            raise CheckpointError(f"{key}: missing", hint="copy or download the checkpoint again")
    channels = qweight.shape[1] if native else qweight.shape[0]
    scales = tensors[f"{prefix}.scales"]
    out, groups = scales.shape[1], channels // group_size
    theta, pairs, channel_scales = (tensors[f"{name}{ROTATION}.{part}"] for part in TRANSFORM)
    _check(name, tensors, needed, out, channels, group_size)
    steps = scales[:groups].t().contiguous()
    if native:
        codes = unpack_tiles(qweight)
        points = _points(name, tensors[f"{prefix}.scaled_zeros"][:groups].t(), steps)
    else:
        codes, points = unpack(qweight, BITS, out), unpack(tensors[f"{prefix}.qzeros"][:groups], BITS, out)
    weight = QuantizedWeight(
        codes=codes,
        points=points,
        steps=steps,
        theta=theta,
        pairs=pairs,
        channel_scales=channel_scales.reshape(-1),
        bits=BITS,
        group_size=group_size,
        in_features=channels,
    )
    check_values(name, weight)
    return weight


def unpack_tiles(qweight: Tensor) -> Tensor:
    """Codes (out, in) uint8 of int16 words (out / 4, in).

    A word holds four neighbouring codes of a tile of 4 rows and 64 columns, low bits first, row after row; within a row
    every 32 columns are permuted twice, for the dequantization trick of the kernel they were made for.
    """
    tiles, columns = qweight.shape
    nibbles = torch.stack([(qweight.int() >> shift) & 15 for shift in (0, 4, 8, 12)], -1)
    rows = nibbles.view(tiles, columns // TILE_COLUMNS, TILE_ROWS, TILE_COLUMNS).transpose(1, 2)
    stored = rows.reshape(tiles * TILE_ROWS, columns // 32, 32)
    order = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 8)[:, list(AWQ_ORDER)].flatten()
    return stored[..., order.argsort()].reshape(tiles * TILE_ROWS, columns).to(torch.uint8)


def _check(
    name: str, tensors: Mapping[str, Tensor], needed: list[str], out: int, channels: int, group_size: int
) -> None:
    """Shapes and dtypes; the number of rounds and of padding rows is the file's own."""
    scales, theta, pairs, channel_scales, zeros = needed
    groups = channels // group_size
    rounds, rows = tensors[theta].shape[0], max(groups, tensors[scales].shape[0])
    rows_of_zeros = rows if zeros.endswith("scaled_zeros") else max(groups, tensors[zeros].shape[0])
    qweight = f"{name}{CODES}.qweight"
    native = tensors[qweight].dtype == torch.int16
    want: dict[str, Header] = {
        qweight: (torch.int16, (out // TILE_ROWS, channels)) if native else (torch.int32, (channels, out // 8)),
        zeros: (torch.float16, (rows_of_zeros, out)) if native else (torch.int32, (rows_of_zeros, out // 8)),
        scales: (torch.float16, (rows, out)),
        theta: (torch.float16, (rounds, channels // 2)),
        pairs: (torch.int16, (rounds, channels)),
        channel_scales: (torch.float16, (1, channels)),
    }
    found = headers_of({key: tensors[key] for key in want})
    if tensors[channel_scales].numel() == channels:  # some files have it flat
        found[channel_scales] = (found[channel_scales][0], (1, channels))
    check_headers(want, found)


def _points(name: str, scaled_zeros: Tensor, steps: Tensor) -> Tensor:
    """Zero codes of scaled_zeros = −step · zero code, both (out, in / G)."""
    exact = steps.abs() >= torch.finfo(torch.float16).smallest_normal  # others belong to groups of zeros
    zeros = torch.where(exact, -scaled_zeros.float() / steps.float(), 0)
    points = zeros.round()
    if not ((zeros - points).abs() < FARTHEST_ZERO).all() or points.min() < 0 or points.max() >= 2**BITS:
        raise CheckpointError(
            f"{name}{CODES}.scaled_zeros: not −scales times whole numbers from 0 to {2**BITS - 1}",
            hint="the file is damaged or of another layout",
        )
    return points.to(torch.uint8)
