"""From the stacked rows of a bundle to one quantized matrix a part."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import Bundle
from luthier.quantize.weights import QuantizedWeight


def assemble(
    bundle: Bundle,
    *,
    codes: Tensor,
    points: Tensor,
    steps: Tensor,
    channel_scales: Tensor,
    config: QuantizeConfig,
    theta: Tensor | None = None,
    pairs: Tensor | None = None,
) -> dict[str, QuantizedWeight]:
    """Divide codes (rows, in), points and steps (rows, in / G) among the parts, which share the transform.

    Without theta and pairs there is no rotation. CheckpointError when a number does not fit into a file's fp16.
    """
    channels = codes.shape[1]
    theta = torch.zeros(0, channels // 2) if theta is None else theta
    pairs = torch.zeros(0, channels) if pairs is None else pairs
    shared = {
        "theta": theta.half().cpu(),
        "pairs": pairs.to(torch.int16).cpu(),
        "channel_scales": channel_scales.half().cpu(),
    }
    halves = {"steps": steps.half().cpu(), **{name: shared[name] for name in ("theta", "channel_scales")}}
    for name, values in halves.items():
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{', '.join(part.name for part in bundle.parts)}: {name} are not finite in fp16",
                hint="train the scales as logarithms (scale_parameter log), or lower learning_rate_transform",
            )
    found, row = dict[str, QuantizedWeight](), 0
    for part in bundle.parts:
        rows = slice(row, row + part.rows)
        found[part.name] = QuantizedWeight(
            codes=codes[rows].to(torch.uint8).cpu(),
            points=points[rows].to(torch.uint8).cpu(),
            steps=halves["steps"][rows],
            **shared,
            bits=config.bits,
            group_size=config.group_size,
            in_features=bundle.in_features,
        )
        row += part.rows
    return found
