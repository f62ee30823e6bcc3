"""What quantizing a model will give and cost, from its architecture alone: no weight is needed.

The model is a `meta` one, without storage; the matrices are found by their modules, as `layer.plan_bundles` finds them
by running a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod

from torch import nn
from transformers import PreTrainedModel

from luthier.core.errors import CheckpointError
from luthier.models.stream import decoder_layers
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import EXPERT_MATRICES
from luthier.quantize.tensors import expected, is_experts

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
DEVICES = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s from the vendor's data sheets
ASSUMED_UTILIZATION = 0.12  # that of the published run: 9 hours on an H200 for Llama-3-8B, by the same count


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) to quantize, or the stacked matrices of `experts` experts (0: an ordinary one)."""

    name: str
    out: int
    in_features: int
    experts: int

    @property
    def weights(self) -> int:
        """Weights of all its matrices."""
        return self.out * self.in_features


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layers, their matrices, other parameters (each once), bytes of a checkpoint by part, and operations to train."""

    layers: int
    matrices: tuple[Matrix, ...]
    other_parameters: int
    code_bytes: int
    metadata_bytes: int
    other_bytes: int
    flops: float

    @property
    def weights(self) -> int:
        """Weights that are quantized."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def body_bits(self) -> tuple[float, float]:
        """Bits of codes and of metadata, per quantized weight."""
        return 8 * self.code_bytes / self.weights, 8 * self.metadata_bytes / self.weights

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self.code_bytes + self.metadata_bytes + self.other_bytes

    @property
    def file_bits(self) -> float:
        """Bits of the checkpoint per parameter of the model."""
        return 8 * self.file_bytes / (self.weights + self.other_parameters)


def plan(model: PreTrainedModel, config: QuantizeConfig) -> Plan:
    """Plan a model, which may be on the device `meta`. CheckpointError when nothing in it can be quantized."""
    prefix, layers = decoder_layers(model)
    matrices = tuple(
        Matrix(f"{prefix}.{index}.{matrix.name}", matrix.out, matrix.in_features, matrix.experts)
        for index, layer in enumerate(layers)
        for matrix in _matrices(layer, config)
    )
    if not matrices:
        raise CheckpointError(
            f"{type(model).__name__}: no linear module to quantize in its layers",
            hint="check `skip`; architectures without nn.Linear layers are not supported",
        )
    codes, metadata = _matrix_bytes(matrices, config)
    weights = sum(matrix.weights for matrix in matrices)
    other = sum(parameter.numel() for parameter in model.parameters()) - weights
    return Plan(
        layers=len(layers),
        matrices=matrices,
        other_parameters=other,
        code_bytes=codes,
        metadata_bytes=metadata,
        other_bytes=BYTES[config.dtype] * other,
        flops=_flops(matrices, config),
    )


def _matrices(layer: nn.Module, config: QuantizeConfig) -> Iterator[Matrix]:
    """Linear modules and stacked experts of a layer, without those that `skip` names."""
    found = [
        Matrix(name, module.out_features, module.in_features, 0)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[2] in EXPERT_MATRICES and parameter.dim() == 3:
            found.append(Matrix(name, prod(parameter.shape[:2]), parameter.shape[2], parameter.shape[0]))
    for matrix in found:
        if not any(fnmatch(matrix.name, pattern) for pattern in config.skip):
            yield matrix


def _matrix_bytes(matrices: tuple[Matrix, ...], config: QuantizeConfig) -> tuple[int, int]:
    """Bytes of codes and of all else that a checkpoint stores of the matrices."""
    codes, metadata = 0, 0
    for matrix in matrices:
        headers = expected(
            matrix.name,
            out_features=matrix.out,
            in_features=matrix.in_features,
            bits=config.bits,
            group_size=config.group_size,
            rounds=config.rounds if config.method in ("paroquant", "rotated-gptq") else 0,
            experts=matrix.experts if is_experts(matrix.name) else 0,
        )
        for name, (dtype, shape) in headers.items():
            size = dtype.itemsize * prod(shape)
            codes, metadata = (codes + size, metadata) if name.endswith(".qweight") else (codes, metadata + size)
    return codes, metadata


def _flops(matrices: tuple[Matrix, ...], config: QuantizeConfig) -> float:
    """Operations, about: each window twice through the original layer and once through the quantized one, and three
    passes (forward, and backward of twice its size) for every epoch, without attention scores. All experts count."""
    windows = config.samples + config.validation_samples
    epochs = {"paroquant": sum(config.epochs), "rotated-gptq": config.epochs[0]}.get(config.method, 0)
    passes = 3 + 3 * epochs
    return 2.0 * sum(matrix.weights for matrix in matrices) * windows * config.sequence_length * passes
