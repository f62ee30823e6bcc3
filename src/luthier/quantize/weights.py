"""What a checkpoint stores of one quantized matrix, in readable form; kernels and files pack it their own way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.quantize.affine import decode
from luthier.quantize.rotation import apply_blocks, block_matrices


def padded(channels: int, group_size: int) -> int:
    """Input channels after filling the last group with zeros."""
    return -(-channels // group_size) * group_size


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One matrix (out, in), quantized after its input channels were scaled and rotated; `in` is padded to full groups.

    codes (out, in) uint8; points (out, in / G) uint8, codes of zero; steps (out, in / G) fp16; theta (K, in / 2) fp16
    radians; pairs (K, in) int16; channel_scales (in,) fp16, which multiply the activation (the paper's 1/α).
    The product is  y = rotate(x · channel_scales) @ ((codes − points) · steps)ᵀ. K may be 0: no rotation.
    The experts of one layer are stacked along `out`. A bias is no part of this.
    """

    codes: Tensor
    points: Tensor
    steps: Tensor
    theta: Tensor
    pairs: Tensor
    channel_scales: Tensor
    bits: int
    group_size: int
    in_features: int

    @property
    def rounds(self) -> int:
        """K, the number of rotation rounds."""
        return self.theta.shape[0]

    def rotated(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix in the rotated basis, (out, in); computed in fp32."""
        out = self.codes.shape[0]
        grouped = self.codes.view(out, -1, self.group_size)
        values = decode(grouped, self.points[..., None], self.steps[..., None].float())
        return values.view(out, -1).to(dtype)

    def transform_blocks(self) -> Tensor:
        """channel_scales and rotation as one fp32 matrix a group, (in / G, G, G): x'_g = x_g @ matrix[g]."""
        matrices = block_matrices(self.pairs, self.theta.float(), group_size=self.group_size)
        return self.channel_scales.float().view(-1, self.group_size, 1) * matrices

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in_features) in the original basis: y = x @ weightᵀ; computed in fp32."""
        blocks = self.transform_blocks().transpose(1, 2)
        return apply_blocks(self.rotated(), blocks)[:, : self.in_features].to(dtype)

    def transform(self) -> tuple[Tensor, Tensor, Tensor]:
        """(channel_scales, pairs, theta): matrices for which these are equal can share one transform of the input."""
        return self.channel_scales, self.pairs, self.theta
