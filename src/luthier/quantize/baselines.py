"""Baselines on the same quantizer, files and kernels as ParoQuant, so that a comparison is at equal bits.

Departures: AWQ's scales are stored with the matrix, not folded into its neighbour, so every matrix can have them; its
errors are computed from the input's second moments, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.quantize.affine import SMALLEST_RANGE, encode, fake_quantize, grid
from luthier.quantize.assemble import assemble
from luthier.quantize.gptq import gptq, hessians
from luthier.quantize.layer import Bundle, LayerTask
from luthier.quantize.scales import search_scales
from luthier.quantize.weights import QuantizedWeight, padded

SHRINKS = tuple(1 - 0.05 * i for i in range(11))  # of a group's range, in AWQ's search for clipping


@torch.no_grad()
def rtn(task: LayerTask) -> dict[str, QuantizedWeight]:
    """Round to nearest: each group on the grid of its own range."""
    found = dict[str, QuantizedWeight]()
    for bundle in task.bundles:
        grouped = _grouped(_weight(task, bundle), task)
        found |= _finish(task, bundle, grouped, *grid(grouped, task.config.bits))
    return found


@torch.no_grad()
def awq(task: LayerTask) -> dict[str, QuantizedWeight]:
    """Activation-aware scales and clipping (Lin et al., arXiv 2306.00978), both by search."""
    found, moments = dict[str, QuantizedWeight](), hessians(task)
    bits, size = task.config.bits, task.config.group_size
    for index, bundle in enumerate(task.bundles):
        weight = _weight(task, bundle)
        if index not in moments:
            grouped = _grouped(weight, task)
            found |= _finish(task, bundle, grouped, *grid(grouped, bits))
            continue
        hessian = _pad_both(moments[index], weight.shape[1])
        alpha = 1 / (1 / search_scales(weight, hessian, bits=bits, group_size=size)).half().float()
        grouped = _grouped(weight * alpha, task)
        step, zero = _clipped_grid(grouped, hessian / alpha / alpha[:, None], bits)
        found |= _finish(task, bundle, grouped, step, zero, alpha)
    return found


@torch.no_grad()
def gptq_method(task: LayerTask) -> dict[str, QuantizedWeight]:
    """GPTQ on the weights as they are."""
    found, moments = dict[str, QuantizedWeight](), hessians(task)
    bits, size = task.config.bits, task.config.group_size
    for index, bundle in enumerate(task.bundles):
        weight = _weight(task, bundle)
        grouped = _grouped(weight, task)
        step, zero = grid(grouped, bits)
        if index not in moments:
            found |= _finish(task, bundle, grouped, step, zero)
            continue
        hessian, step = _pad_both(moments[index], weight.shape[1]), _stored(step)
        codes, points, _ = gptq(weight, hessian, bits=bits, group_size=size, step=step, zero=zero)
        ones = torch.ones(weight.shape[1])
        found |= assemble(
            bundle, codes=codes, points=points, steps=step[..., 0], channel_scales=ones, config=task.config
        )
    return found


def _clipped_grid(grouped: Tensor, hessian: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each row and group, the shrunken range with the smallest error, given the second moments within the group."""
    groups, size = grouped.shape[1:]
    within = hessian.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (in / G, G, G)
    step, zero = grid(grouped, bits)
    best_step, best = step.clone(), torch.full_like(step, torch.inf)
    for shrink in SHRINKS:
        error = fake_quantize(grouped, step * shrink, zero, bits) - grouped
        loss = (torch.einsum("rgi,gij->rgj", error, within) * error).sum(-1, keepdim=True)
        best_step = torch.where(loss < best, step * shrink, best_step)
        best = torch.minimum(best, loss)
    return best_step, zero


def _finish(
    task: LayerTask, bundle: Bundle, grouped: Tensor, step: Tensor, zero: Tensor, alpha: Tensor | None = None
) -> dict[str, QuantizedWeight]:
    step = _stored(step)
    codes, points = encode(grouped, step, zero, task.config.bits)
    ones = torch.ones(codes[0].numel(), device=codes.device)
    return assemble(
        bundle,
        codes=codes.flatten(1),
        points=points[..., 0],
        steps=step[..., 0],
        channel_scales=ones if alpha is None else 1 / alpha,
        config=task.config,
    )


def _stored(step: Tensor) -> Tensor:
    """Step sizes as a file holds them."""
    return step.clamp(min=SMALLEST_RANGE).half().float()


def _weight(task: LayerTask, bundle: Bundle) -> Tensor:
    weight = bundle.stack(dict(task.layer.named_parameters())).float()
    return F.pad(weight, (0, padded(weight.shape[1], task.config.group_size) - weight.shape[1]))


def _grouped(weight: Tensor, task: LayerTask) -> Tensor:
    return weight.view(len(weight), -1, task.config.group_size)


def _pad_both(hessian: Tensor, size: int) -> Tensor:
    return F.pad(hessian, (0, size - len(hessian)) * 2)
