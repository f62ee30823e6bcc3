"""The rotation of a few rows on a CPU, in C (core/native.py compiles it).

Decoding rotates one row for every matrix, where the calls of K rounds of tensor operations would cost more than the
arithmetic, and dense matrices more bytes than the weights. Where there is no compiler, the caller uses the dense form.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.core.native import load_library
from luthier.quantize.weights import QuantizedWeight

SOURCE = Path(__file__).with_name("rotate.c")
NAMES = {torch.bfloat16: "rotate_bf16", torch.float32: "rotate_fp32"}
MAX_GROUP = 256


class Native(NamedTuple):
    """The compiled functions by dtype, none where they cannot be had, and why."""

    functions: dict[torch.dtype, Callable[..., None]]
    reason: str


@dataclass(frozen=True)
class Tables:
    """One transform in the order in which the C code reads it."""

    scales: Tensor
    pairs: Tensor
    cosines: Tensor
    sines: Tensor
    shape: tuple[int, int, int]  # groups, group size, rounds

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where the tables lie; asking torch for each of them would take longer than rotating a row."""
        return self.scales.data_ptr(), self.pairs.data_ptr(), self.cosines.data_ptr(), self.sines.data_ptr()

    @staticmethod
    def of(weight: QuantizedWeight) -> Tables:
        """Tables of a matrix's transform, on the CPU."""
        groups, size, rounds = len(weight.channel_scales) // weight.group_size, weight.group_size, weight.rounds
        pairs = weight.pairs.cpu().view(rounds, groups, size).transpose(0, 1)
        theta = weight.theta.cpu().float().view(rounds, groups, size // 2).transpose(0, 1)
        return Tables(
            weight.channel_scales.cpu().float().contiguous(),
            pairs.to(torch.uint8).contiguous(),
            theta.cos().contiguous(),
            theta.sin().contiguous(),
            (groups, size, rounds),
        )


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Scale and rotate x (rows, in), contiguous, bf16 or fp32, on the CPU; computed in fp32."""
    out = torch.empty_like(x)
    load().functions[x.dtype](x.data_ptr(), out.data_ptr(), *tables.addresses, x.shape[0], *tables.shape)
    return out


@functools.cache
def load() -> Native:
    """Compile once per machine and version of the source, or say why not."""
    library, reason = load_library(SOURCE)
    functions: dict[torch.dtype, Any] = {}
    for dtype, name in NAMES.items() if library is not None else ():
        functions[dtype] = getattr(library, name)
        functions[dtype].argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4
        functions[dtype].restype = None
    return Native(functions, reason)
