"""From the trained byte-level network to its integer form: scales of weights and activations, from sample text.

Weights: 7 bits with a scale for each output, cut where the squared error is least. Activations: one fixed scale for
each place, cut the same way over the sample, except inside the feed-forward block, where each hidden number has its own
scale, which the next matrix takes back. Everything else that the float network multiplies by ends up in these scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.entropy.codec.byte_model import Block, ByteModel, normalized
from luthier.entropy.codec.integer_features import NAMES
from luthier.entropy.codec.integer_reference import (
    FRACTION_BITS,
    LARGEST_SCALE,
    LOGIT_SHIFT,
    SCORE_SHIFT,
    SUM_SHIFT,
)
from luthier.entropy.codec.integer_weights import (
    RESIDUAL_LIMIT,
    WEIGHT_LIMIT,
    IntegerWeights,
    Shape,
    check,
)

Floats = NDArray[np.float64]

RATIOS = np.linspace(0.3, 1.0, 15)  # of the largest magnitude, where to cut
SAMPLE = 1 << 17  # numbers of an activation that are looked at
RESIDUAL_BITS = 12  # finest unit of the residual stream: 2^-12
COARSER = 6  # doublings of that unit at most
HEADROOM = 4  # the residual stream may grow to this many times what the sample shows
BITS_PER_NAT = math.log2(math.e) * (1 << FRACTION_BITS)


def quantize(model: ByteModel, sample: Tensor, provenance: Mapping[str, Any]) -> IntegerWeights:
    """The integer form of `model`. sample: bytes (B, T) of text like that which will be coded, T well over the window.

    CheckpointError when a scale is out of range, which only weights that diverged can cause.
    """
    config, seen = model.config, observe(model, sample)
    arrays = _residual_arrays(model, seen, _residual_unit(model, seen))
    clip = best_clip(seen["head"], 127)
    arrays |= _matrix("head", weight_of(model.head), clip / 127 * BITS_PER_NAT, LOGIT_SHIFT)
    arrays["head.gain"] = _gains(127 / clip * math.sqrt(config.width))
    shape = Shape(**config.to_dict())
    weights = IntegerWeights(shape=shape, arrays=arrays, provenance=dict(provenance))
    check(weights, "the quantized network")
    return weights


def _residual_arrays(
    model: ByteModel, seen: Mapping[str, Floats], unit: float, tries: int = COARSER
) -> dict[str, NDArray[Any]]:
    """All that adds to the residual stream; in a coarser unit when one number of a product is too many fine ones."""
    try:
        arrays = _tables(model, unit) | _code(model, unit)
        for number in range(model.config.layers):
            arrays |= _layer(model, seen, number, unit)
    except CheckpointError:
        if not tries:
            raise
        return _residual_arrays(model, seen, 2 * unit, tries - 1)
    return arrays


@torch.no_grad()
def observe(model: ByteModel, sample: Tensor) -> dict[str, Floats]:
    """What goes through the network on a sample: inputs of its matrices, outputs where these are cut, the residual.

    With segment codes, the sequences are given 0, 1, … m dimensions in turn.
    """
    seen = dict[str, Floats]()
    hooks = list[Any]()

    def watch(module: nn.Module, name: str, look: Callable[[Any, Any], Tensor]) -> None:
        def keep(_: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = look(inputs, output).flatten(0, -2).double().numpy()

        hooks.append(module.register_forward_hook(keep))

    for number, block in enumerate(model.layers):
        watch(block, f"{number}.residual", lambda inputs, output: torch.cat([inputs[0], output]))
        watch(block.attention.query, f"{number}.attention", lambda inputs, output: inputs[0])
        watch(block.attention.query, f"{number}.query", lambda inputs, output: output)
        watch(block.attention.key_value, f"{number}.key_value", lambda inputs, output: output)
        watch(block.attention.out, f"{number}.mixed", lambda inputs, output: inputs[0])
        watch(block.up, f"{number}.feed", lambda inputs, output: inputs[0])
        watch(block.down, f"{number}.hidden", lambda inputs, output: inputs[0])
    watch(model.head, "head", lambda inputs, output: inputs[0])
    try:
        model(sample, torch.arange(len(sample)) % (model.config.code_dims + 1))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def best_clip(values: Floats, levels: int) -> float:
    """The magnitude at which to cut values that become -levels ... levels, for the least squared error."""
    values = values.ravel()[:: max(1, values.size // SAMPLE)]
    largest = max(float(np.abs(values).max()), 1e-12)

    def error(clip: float) -> float:
        return float(
            np.square(np.clip(np.rint(values * (levels / clip)), -levels, levels) * (clip / levels) - values).sum()
        )

    return min((float(ratio * largest) for ratio in RATIOS), key=error)


def weight_of(layer: nn.Module) -> Floats:
    """The matrix of a linear layer or table."""
    weight = layer.get_parameter("weight")
    return weight.detach().double().numpy()


def quantized_rows(matrix: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A matrix (N, K) as integers of -63 ... 63, and the unit of each row (N)."""
    largest = np.maximum(np.abs(matrix).max(1, keepdims=True), 1e-12)
    best, units = np.full(len(matrix), np.inf), np.ones(len(matrix))
    for ratio in RATIOS:
        unit = largest * ratio / WEIGHT_LIMIT
        whole = np.clip(np.rint(matrix / unit), -WEIGHT_LIMIT, WEIGHT_LIMIT)
        error = np.square(whole * unit - matrix).sum(1)
        units = np.where(error < best, unit[:, 0], units)
        best = np.minimum(error, best)
    whole = np.clip(np.rint(matrix / units[:, None]), -WEIGHT_LIMIT, WEIGHT_LIMIT)
    return whole.astype(np.int8), units


def _matrix(name: str, matrix: Floats, factors: Floats | float, shift: int = SUM_SHIFT) -> dict[str, NDArray[Any]]:
    """A matrix and the scales of its outputs: `factors` is the unit of the inputs over that of the outputs."""
    whole, units = quantized_rows(matrix)
    scales = np.rint(units * factors * 2.0 ** (32 - shift))
    if scales.max() > LARGEST_SCALE:
        raise CheckpointError(
            f"{name}: got a scale of {scales.max() / 2**32:.3g}, expected less than 1/2",
            hint="train the network longer or at a lower learning rate",
        )
    return {name: whole, f"{name}.scale": scales.astype(np.int32)}


def _gains(*gains: float) -> NDArray[np.int64]:
    return np.array([round(gain * 2**32) for gain in gains], np.int64)


def _residual_unit(model: ByteModel, seen: Mapping[str, Floats]) -> float:
    """The finest power of two in which the residual stream stays in range."""
    largest = max(float(np.abs(seen[f"{number}.residual"]).max()) for number in range(model.config.layers))
    bits = min(RESIDUAL_BITS, math.floor(math.log2(RESIDUAL_LIMIT / (HEADROOM * largest))))
    return float(2.0**-bits)


def _tables(model: ByteModel, unit: float) -> dict[str, NDArray[Any]]:
    """Rows in 8 bits, each table with one scale in 2^-8 of the residual unit."""
    arrays, scales = dict[str, NDArray[Any]](), list[int]()
    for name, table in zip(NAMES, model.tables, strict=True):
        rows = weight_of(table)
        scales.append(
            max(1, round(best_clip(rows[np.abs(rows).max(1) > 0], 127) / 127 / unit * 256)) if rows.any() else 1
        )
        arrays[f"table.{name}"] = np.clip(np.rint(rows / (scales[-1] * unit / 256)), -127, 127).astype(np.int8)
    return arrays | {"table.scales": np.array(scales, np.int32)}


def _code(model: ByteModel, unit: float) -> dict[str, NDArray[Any]]:
    """Rows of the segment code in 8 bits, with one scale as those of the tables."""
    if model.segment is None:
        return {}
    rows = model.segment.rows().detach().flatten(0, 1).double().numpy()
    scale = max(1, round(float(np.abs(rows).max()) / 127 / unit * 256))
    whole = np.clip(np.rint(rows / (scale * unit / 256)), -127, 127).astype(np.int8)
    return {"code": whole, "code.scale": np.array([scale], np.int32)}


def _layer(model: ByteModel, seen: Mapping[str, Floats], number: int, unit: float) -> dict[str, NDArray[Any]]:
    config, block = model.config, model.layers[number]
    attention, size = block.attention, config.head_width
    clips = {name: best_clip(seen[f"{number}.{name}"], 127) for name in ("attention", "feed", "mixed")}
    queries = seen[f"{number}.query"].reshape(-1, size)
    keys, values = np.split(seen[f"{number}.key_value"], 2, axis=1)
    query_clip = best_clip(normalized(torch.from_numpy(queries)).numpy(), 63)
    key_clip = best_clip(normalized(torch.from_numpy(keys)).numpy(), 127)
    value_unit = best_clip(values, 127) / 127
    # Queries and keys are normalized next, so their unit is free: small beside their size, far from 2^31.
    unit_of_query, unit_of_key = (float(np.abs(x).max()) / (1 << 14) for x in (queries, keys))
    inner = config.heads * size
    units = np.repeat([unit_of_query, unit_of_key, value_unit], [inner, size, size])
    projection = np.concatenate([weight_of(attention.query), weight_of(attention.key_value)])
    sharpness = attention.sharpness.detach().double().exp().numpy() * size**-0.5
    score = sharpness * (query_clip / 63) * (key_clip / 127) * BITS_PER_NAT
    distance = attention.distance.detach().double().numpy()
    mixed_unit = clips["mixed"] / 127
    root = math.sqrt(config.width)
    gains = (
        127 / clips["attention"] * root,
        63 / query_clip * math.sqrt(size),
        127 / key_clip * math.sqrt(size),
        value_unit / mixed_unit,
        127 / clips["feed"] * root,
    )
    return {
        **_matrix(f"{number}.qkv", projection, clips["attention"] / 127 / units),
        **_matrix(f"{number}.out", weight_of(attention.out), mixed_unit / unit),
        **_feed(block, seen[f"{number}.hidden"], number, clips["feed"] / 127, unit),
        f"{number}.scores": np.rint(score * 2.0 ** (32 - SCORE_SHIFT)).astype(np.int32),
        f"{number}.distance": np.rint(distance * BITS_PER_NAT).astype(np.int32),
        f"{number}.gains": _gains(*gains),
    }


def _feed(block: Block, hidden: Floats, number: int, input_unit: float, unit: float) -> dict[str, NDArray[Any]]:
    """Both matrices of a feed-forward block. Its hidden numbers are the squares of what comes before, over 2^16."""
    up, down = weight_of(block.up), weight_of(block.down)
    hidden = hidden[:: max(1, len(hidden) // (SAMPLE // 32))]
    clips = np.array([best_clip(column, 255) for column in hidden.T])
    clips = np.maximum(clips, 1e-3 * clips.max())
    return {
        **_matrix(f"{number}.up", up, input_unit * np.sqrt(255 / clips) * 256),
        **_matrix(f"{number}.down", down * (clips / 255), 1 / unit),
    }
