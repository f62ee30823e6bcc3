"""GPTQ (Frantar et al., arXiv 2210.17323) on our quantizer: round column by column, and let the columns that are left
make up for the error. It serves as a baseline, and in the rotated basis as the start of ParoQuant's second stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.affine import LARGEST_STEP, SMALLEST_RANGE, grid, zero_codes
from luthier.quantize.layer import EXPERT_MATRICES, LayerTask
from luthier.quantize.rotation import apply_blocks

BLOCK = 128  # columns whose corrections reach the rest in one product
DAMPING = 0.01  # of the mean second moment, added to all
MAX_DAMPING = 1.0


@torch.no_grad()
def hessians(task: LayerTask) -> dict[int, Tensor]:
    """Second moments Σ x xᵀ (in, in), fp32, of each bundle's input over the calibration windows, by its index.

    Inside fused experts only the input of gate and up is seen: their down_proj has no entry, and is rounded to nearest.
    """
    found = dict[int, Tensor]()
    handles = []
    for index, bundle in enumerate(task.bundles):
        owner, _, last = bundle.parts[0].parameter.rpartition(".")
        if last == EXPERT_MATRICES[1]:
            continue
        handles.append(task.layer.get_submodule(owner).register_forward_pre_hook(_Sum(found, index)))
    try:
        for start in range(0, len(task.inputs), task.config.micro_batch_size):
            stop = min(start + task.config.micro_batch_size, len(task.inputs))
            task.forward(task.inputs.read(start, stop))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Sum:
    def __init__(self, found: dict[int, Tensor], index: int) -> None:
        self.found, self.index = found, index

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        product = x.T @ x
        self.found[self.index] = self.found[self.index] + product if self.index in self.found else product


def rotated_hessian(hessian: Tensor, blocks: Tensor) -> Tensor:
    """Second moments of x · B for block-diagonal B (in / G, G, G): Bᵀ H B."""
    return apply_blocks(apply_blocks(hessian, blocks).T.contiguous(), blocks).T.contiguous()


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    step: Tensor | None = None,
    zero: Tensor | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, in), zero codes (rows, in / G) and step sizes (rows, in / G) of weight (rows, in).

    hessian (in, in) is the input's Σ x xᵀ. step and zero, (rows, in / G, 1) as `affine.grid` makes them, fix the grid;
    by default it is that of the weights before any correction.
    CheckpointError when no damping makes the second moments positive definite: they are not finite.
    """
    if step is None or zero is None:
        step, zero = grid(weight.view(len(weight), -1, group_size), bits)
    step = step.clamp(SMALLEST_RANGE, LARGEST_STEP)[..., 0]
    points, top = zero_codes(zero, bits)[..., 0], 2**bits - 1
    factor = _inverse_factor(hessian, damping)
    left, codes = weight.clone(), torch.empty_like(weight, dtype=torch.uint8)
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            size, point = step[:, column // group_size], points[:, column // group_size]
            code = ((left[:, column] / size).round() + point).clamp(0, top)
            codes[:, column] = code.to(torch.uint8)
            error = (left[:, column] - (code - point) * size) / factor[column, column]
            left[:, column:last] -= error[:, None] * factor[column, column:last]
            errors[:, column - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes, points, step


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H⁻¹, in fp32; channels that are always 0 count as independent."""
    exact = hessian.double()
    diagonal = exact.diagonal()
    mean = diagonal.mean() if bool(diagonal.any()) else torch.ones_like(diagonal[0])
    exact = exact + torch.diag(torch.where(diagonal == 0, mean, 0.0))
    while damping <= MAX_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(exact + damping * mean * torch.eye(len(exact)).to(exact))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
    raise CheckpointError(
        "the second moments of a layer's input are not positive definite, however much they are damped",
        hint="the activations are not finite: check the model's weights, or use --precision fp32",
    )
