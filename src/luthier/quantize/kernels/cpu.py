"""Products and rotations on a CPU, from torch's own operators.

torch's 4-bit product reads codes 0 to 15 and means (code − 8) · scale + offset, so scale = s and offset = (8 − z) · s
give (code − z) · s. Scale and offset are bf16. Codes of 2 and 3 bits are moved by 8 − z, which needs no offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from luthier.quantize.kernels import native
from luthier.quantize.packing import AWQ_ORDER, unpack
from luthier.quantize.weights import QuantizedWeight

ROW_BLOCK = 64  # rows that torch packs together on AVX-512; 32 on AVX2
CHUNK = 1 << 17  # codes dequantized at a time: their temporaries stay in the L2 cache


@dataclass(frozen=True)
class Stored:
    """One matrix (out, in) as in a checkpoint: words (in, …) and (in / G, …) int32, steps (in / G, out) fp16."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bits: int
    group_size: int

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.scales.shape[1]


class Blocks:
    """x (rows, in) → the same, scaled and rotated; one dense matrix a group, fp32 inside, the dtype of x outside."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.blocks = weight.transform_blocks().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows, (groups, size, _) = x.shape[0], self.blocks.shape
        if rows == 1:
            return torch.bmm(x.float().view(groups, 1, size), self.blocks).view(1, -1).to(x.dtype)
        turned = torch.bmm(x.float().view(rows, groups, size).transpose(0, 1), self.blocks)
        return turned.transpose(0, 1).reshape(rows, -1).to(x.dtype)


class Compiled:
    """x (rows, in), bf16 or fp32 → the same, scaled and rotated by the compiled code; fp32 inside."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.tables = native.Tables.of(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return native.rotate(x.contiguous(), self.tables)


class Int4:
    """x (rows, in) bf16, rotated → (rows, out of all matrices): torch's 4-bit product, at its best for a few rows."""

    def __init__(self, matrices: Sequence[Stored]) -> None:
        first = matrices[0]
        self.group_size, self.out_features = first.group_size, sum(m.out_features for m in matrices)
        filler = -self.out_features % ROW_BLOCK
        codes = torch.cat([unpack(m.qweight, m.bits, m.out_features) for m in matrices]).int()
        points = torch.cat([unpack(m.qzeros, m.bits, m.out_features) for m in matrices]).int()  # (out, in / G)
        if first.bits < 4:
            codes += (8 - points).repeat_interleave(self.group_size, 1)
            points.fill_(8)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(pad(codes, (0, 0, 0, filler)), 1)
        steps = torch.cat([m.scales for m in matrices], 1).bfloat16().float()  # so that code z is about 0
        grid = torch.stack([steps, (8 - points.t()) * steps], -1)  # (in / G, out, 2)
        self.grid = pad(grid, (0, 0, 0, filler)).bfloat16().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.grid)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features]


class Dequantize:
    """x (rows, in), rotated → (rows, out of all matrices): weights are decoded for every call, and kept nowhere."""

    def __init__(self, matrices: Sequence[Stored]) -> None:
        self.matrices = tuple(matrices)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [x @ dequantize(matrix, x.dtype) for matrix in self.matrices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Dense:
    """x (rows, in_features), not rotated → (rows, out of all matrices): decoded once, rotated back, and kept."""

    def __init__(self, weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> None:
        self.weight = torch.cat([weight.dequantized(dtype) for weight in weights])

    def __call__(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight.t()).to(x.dtype)


def dequantize(matrix: Stored, dtype: torch.dtype) -> Tensor:
    """The rotated matrix, transposed: (in, out), decoded in fp32 a few groups at a time."""
    size, out = matrix.group_size, matrix.out_features
    channels = matrix.qweight.shape[0]
    points, steps = _codes(matrix.qzeros, matrix.bits, out).float(), matrix.scales.float()
    result = torch.empty(channels, out, dtype=dtype, device=matrix.scales.device)
    groups = max(1, CHUNK // (size * out))
    for start in range(0, channels // size, groups):
        stop = min(start + groups, channels // size)
        rows = slice(start * size, stop * size)
        values = _codes(matrix.qweight[rows], matrix.bits, out).view(stop - start, size, out).float()
        values.sub_(points[start:stop, None]).mul_(steps[start:stop, None])
        result[rows] = values.view(-1, out)
    return result


def _codes(words: Tensor, bits: int, out: int) -> Tensor:
    """Codes (n, out) of words (n, …); 4 bits by one broadcast shift, the others through `unpack`."""
    if bits != 4:
        return unpack(words, bits, out).t()
    shifts = torch.tensor([4 * AWQ_ORDER.index(i) for i in range(8)], dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(1)[:, :out]
