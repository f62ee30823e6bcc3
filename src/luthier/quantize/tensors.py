"""A quantized matrix as the tensors of a checkpoint, in the layout that the authors' package reads and writes.

For a linear module P with weight (out, in):

    P.qweight         int32  (in, words)       codes of the rotated weight, see `packing`
    P.qzeros          int32  (in / G, words)   codes of zero
    P.scales          fp16   (in / G, out)     step sizes
    P.theta           fp16   (K, in / 2)       angles
    P.pairs           int16  (K, in)           channels within their group
    P.channel_scales  fp16   (1, in)           multiply the activation

The experts of a layer B have the first three each, `B.{e}.gate_proj.qweight`, and one transform for all,
`B.gate_up_weight_theta`. Our extensions: `in` is filled up to whole groups, `out` to whole words; K may be 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.quantize.packing import pack, packed_words, unpack
from luthier.quantize.pairs import check_pairs
from luthier.quantize.weights import QuantizedWeight, padded

Header = tuple[torch.dtype, tuple[int, ...]]
MATRIX = ("qweight", "qzeros", "scales")
TRANSFORM = ("theta", "pairs", "channel_scales")
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT_TRANSFORMS = {"gate_up_proj": "gate_up_weight", "down_proj": "down_weight"}
DAMAGED = "the file is damaged or of another format: copy or write the checkpoint again"


def is_experts(name: str) -> bool:
    """Whether a name such as model.layers.0.mlp.experts.down_proj means the stacked matrices of all experts."""
    *_, parent, last = ["", "", *name.split(".")]
    return parent == "experts" and last in EXPERT_PARTS


def pieces(name: str, rows: int, experts: int) -> Iterator[tuple[str, slice]]:
    """The name and the rows of every matrix in a stack of `rows`; just the name for one matrix (experts 0)."""
    if not experts:
        yield name, slice(0, rows)
        return
    block, _, last = name.rpartition(".")
    step = rows // (experts * len(EXPERT_PARTS[last]))
    names = [f"{block}.{expert}.{part}" for expert in range(experts) for part in EXPERT_PARTS[last]]
    yield from ((piece, slice(i * step, (i + 1) * step)) for i, piece in enumerate(names))


def transform_names(name: str, experts: int) -> tuple[str, str, str]:
    """Names of theta, pairs and channel_scales."""
    block, _, last = name.rpartition(".")
    prefix = f"{block}.{EXPERT_TRANSFORMS[last]}_" if experts else f"{name}."
    return f"{prefix}theta", f"{prefix}pairs", f"{prefix}channel_scales"


def expected(
    name: str, *, out_features: int, in_features: int, bits: int, group_size: int, rounds: int, experts: int = 0
) -> dict[str, Header]:
    """Dtype and shape of every tensor of a matrix (out, in), or of a stack of experts with `out` rows in total."""
    channels = padded(in_features, group_size)
    groups = channels // group_size
    headers = dict[str, Header]()
    for piece, rows in pieces(name, out_features, experts):
        out = rows.stop - rows.start
        headers[f"{piece}.qweight"] = (torch.int32, (channels, packed_words(out, bits)))
        headers[f"{piece}.qzeros"] = (torch.int32, (groups, packed_words(out, bits)))
        headers[f"{piece}.scales"] = (torch.float16, (groups, out))
    theta, pairs, channel_scales = transform_names(name, experts)
    headers[theta] = (torch.float16, (rounds, channels // 2))
    headers[pairs] = (torch.int16, (rounds, channels))
    headers[channel_scales] = (torch.float16, (1, channels))
    return headers


def check_headers(want: Mapping[str, Header], found: Mapping[str, Header]) -> None:
    """CheckpointError naming the first tensor that is missing, mis-shaped or of another dtype."""
    for name, (dtype, shape) in want.items():
        if name not in found:
            raise CheckpointError(f"{name}: missing, expected {_describe(dtype, shape)}", hint=DAMAGED)
        if found[name] != (dtype, shape):
            raise CheckpointError(
                f"{name}: got {_describe(*found[name])}, expected {_describe(dtype, shape)}",
                hint="check bits, group_size and krot of quantization_config in config.json; otherwise " + DAMAGED,
            )


def to_tensors(name: str, weight: QuantizedWeight, experts: int = 0) -> dict[str, Tensor]:
    """A quantized matrix, or the stack of `experts` experts of a layer, as tensors by name.

    CheckpointError for values that no reader could use: shapes that do not fit, wrong pairs, NaN.
    """
    check_values(name, weight)
    tensors = dict[str, Tensor]()
    for piece, rows in pieces(name, weight.codes.shape[0], experts):
        tensors[f"{piece}.qweight"] = pack(weight.codes[rows], weight.bits)
        tensors[f"{piece}.qzeros"] = pack(weight.points[rows], weight.bits)
        tensors[f"{piece}.scales"] = weight.steps[rows].t().contiguous()
    theta, pairs, channel_scales = transform_names(name, experts)
    tensors[theta] = weight.theta.contiguous()
    tensors[pairs] = weight.pairs.contiguous()
    tensors[channel_scales] = weight.channel_scales.view(1, -1).contiguous()
    want = expected(
        name,
        out_features=weight.codes.shape[0],
        in_features=weight.in_features,
        bits=weight.bits,
        group_size=weight.group_size,
        rounds=weight.rounds,
        experts=experts,
    )
    check_headers(want, headers_of(tensors))
    return tensors


def from_tensors(
    name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int, bits: int, group_size: int
) -> QuantizedWeight:
    """The inverse of `to_tensors`. `out_features` are the rows of all experts; `tensors` may hold others too.

    CheckpointError naming the tensor when one is missing, mis-shaped, of another dtype, or has impossible values.
    """
    experts = count_experts(name, tensors)
    theta, pairs, channel_scales = transform_names(name, experts)
    want = expected(
        name,
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        rounds=next((tensors[key].shape[0] for key in (theta, pairs) if key in tensors), 0),
        experts=experts,
    )
    found = {key: tensors[key] for key in want if key in tensors}
    check_headers(want, headers_of(found))
    matrices = [(piece, rows.stop - rows.start) for piece, rows in pieces(name, out_features, experts)]
    weight = QuantizedWeight(
        codes=torch.cat([unpack(found[f"{piece}.qweight"], bits, out) for piece, out in matrices]),
        points=torch.cat([unpack(found[f"{piece}.qzeros"], bits, out) for piece, out in matrices]),
        steps=torch.cat([found[f"{piece}.scales"].t() for piece, _ in matrices]).contiguous(),
        theta=found[theta],
        pairs=found[pairs],
        channel_scales=found[channel_scales].view(-1),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )
    check_values(name, weight)
    return weight


def count_experts(name: str, tensors: Mapping[str, object]) -> int:
    """Experts of a stack, 0 for one matrix. Numbers are counted from 0 upwards."""
    if not is_experts(name):
        return 0
    block, _, last = name.rpartition(".")
    experts = 0
    while f"{block}.{experts}.{EXPERT_PARTS[last][0]}.qweight" in tensors:
        experts += 1
    if not experts:
        raise CheckpointError(f"{block}.0.{EXPERT_PARTS[last][0]}.qweight: missing", hint=DAMAGED)
    return experts


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, Header]:
    """Dtype and shape of tensors by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def check_values(name: str, weight: QuantizedWeight) -> None:
    """CheckpointError for NaN or infinite values, for pairs that are no permutation, and for a grid without a size."""
    check_steps(f"{name}: scales", weight.steps)
    check_transform(name, *weight.transform(), weight.group_size)


def check_steps(name: str, steps: Tensor) -> None:
    """CheckpointError when a step size is NaN or infinite, or none is above 0.

    Single ones of 0 or below are let pass: training can leave them behind in groups of zeros, and they decode.
    """
    check_finite(name, steps)
    if not (steps > 0).any():
        raise CheckpointError(f"{name}: no step size is above 0", hint=DAMAGED)


def check_transform(name: str, channel_scales: Tensor, pairs: Tensor, theta: Tensor, group_size: int) -> None:
    """CheckpointError for values of a transform that are NaN or infinite, and for pairs that are no permutation."""
    check_finite(f"{name}: channel_scales", channel_scales)
    check_finite(f"{name}: theta", theta)
    check_pairs(pairs.cpu().numpy(), group_size, f"{name}: pairs")


def check_finite(name: str, values: Tensor) -> None:
    """CheckpointError when a value is NaN or infinite."""
    if not values.isfinite().all():
        raise CheckpointError(f"{name} has values that are NaN or infinite", hint=DAMAGED)


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"
