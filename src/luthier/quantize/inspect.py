"""What is inside a quantized folder: where its bits go, how its grid and angles are distributed, who else can load it.

Sizes come from the files' headers alone; of the values, only zero codes, pairs, angles and scales are read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luthier.core.files import read_json
from luthier.models.tensor_files import TensorFiles
from luthier.quantize import older_layouts
from luthier.quantize.checkpoint import QuantizedFolder, owner, read_quantized
from luthier.quantize.packing import unpack
from luthier.quantize.tensors import TRANSFORM, is_experts

PARTS = {
    "codes": ("qweight",),
    "steps": ("scales",),
    "zero points": ("qzeros", "scaled_zeros"),
    "theta": ("theta",),
    "pairs": ("pairs",),
    "channel scales": ("channel_scales",),
}
_PART_OF = {suffix: part for part, suffixes in PARTS.items() for suffix in suffixes}
_LAYER = re.compile(r"(.*\.\d+)\.(.+)")
OWN_ARCHITECTURES = ("instella",)
NATIVE, INTERMEDIATE, PRESENT = "paper-era", "intermediate", "present"


@dataclass(frozen=True)
class ModuleSizes:
    """The quantized modules of one kind: `modules` of them with `weights` weights, and bytes by part (see PARTS)."""

    kind: str
    modules: int
    weights: int
    bytes: Mapping[str, int]

    def bits(self, part: str) -> float:
        """Bits a weight of one part; padding counts as its cost."""
        return 8 * self.bytes.get(part, 0) / self.weights

    @property
    def metadata_bits(self) -> float:
        """Bits a weight of everything but the codes."""
        return self.total_bits - self.bits("codes")

    @property
    def total_bits(self) -> float:
        """Bits a weight of all parts."""
        return 8 * sum(self.bytes.values()) / self.weights


@dataclass(frozen=True)
class Angles:
    """Distribution of the angles in radians; `rms` over all, `idle` is the part that is exactly 0."""

    rms: float
    mean_magnitude: float
    largest: float
    idle: float


@dataclass(frozen=True)
class Reader:
    """A program that reads ParoQuant checkpoints; `reasons` say why it cannot load this one, () when it can."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_checkpoint` found. Sizes in bytes; `other_bytes` by embeddings, head and rest.

    `zero_points[z]` counts the groups with zero code z. `shared_pairs` and `shared_transforms` are the parts of the
    modules that have the same pairs, or the whole transform, as another module with their layer and input size.
    """

    folder: str
    layout: str
    bits: int
    group_size: int
    rounds: int
    groups: tuple[ModuleSizes, ...]
    body: ModuleSizes
    other_bytes: Mapping[str, int]
    other_parameters: int
    file_bytes: int
    tied_head: bool
    zero_points: tuple[int, ...]
    angles: Angles
    shared_pairs: float
    shared_transforms: float
    readers: tuple[Reader, ...]

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the weight files per parameter of the model, embeddings included; a tied head counts once."""
        return 8 * self.file_bytes / (self.body.weights + self.other_parameters)


@dataclass(frozen=True)
class _Matrix:
    """Header facts of one quantized module: the names of its tensors, and its size without padding."""

    name: str
    tensors: tuple[str, ...]
    out: int
    in_features: int
    channels: int
    rows_of_pieces: tuple[int, ...]

    @property
    def kind(self) -> str:
        found = _LAYER.fullmatch(self.name)
        return found[2] if found else self.name


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read what a quantized folder consists of. CheckpointError for a folder that is not quantized, or damaged."""
    quantized = read_quantized(folder)
    config, tensors = read_json(folder / "config.json"), quantized.tensors
    bits, group_size = quantized.bits, quantized.group_size
    for name in quantized:
        if not older_layouts.is_older(name, tensors):
            quantized.check(name)
    owned = defaultdict[str, list[str]](list)
    other = list[str]()
    for name in tensors:
        key = owner(name, tensors)
        (owned[key] if key in quantized.names else other).append(name)
    matrices = [_matrix(name, owned[name], quantized) for name in owned]
    kinds = Counter(matrix.kind for matrix in matrices)
    transforms = {matrix.name: _transform(matrix, tensors) for matrix in matrices}
    rounds = max(theta.shape[0] for theta, _, _ in transforms.values())
    layout = _layout(matrices, tensors)
    facts = _Facts(bits, group_size, rounds, layout, str(config.get("model_type")), tuple(matrices))
    return Inspection(
        folder=str(folder),
        layout=layout,
        bits=bits,
        group_size=group_size,
        rounds=rounds,
        groups=tuple(_sizes(kind, [m for m in matrices if m.kind == kind], tensors) for kind in kinds),
        body=_sizes("all", matrices, tensors),
        other_bytes=_other_bytes(other, tensors),
        other_parameters=sum(_numel(name, tensors) for name in other),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        tied_head=not any(_role(name) == "head" for name in other),
        zero_points=_zero_points(quantized, matrices, layout),
        angles=_angles(theta for theta, _, _ in transforms.values()),
        shared_pairs=_shared(matrices, {name: (pairs,) for name, (_, pairs, _) in transforms.items()}),
        shared_transforms=_shared(matrices, transforms),
        readers=tuple(Reader(name, tuple(_obstacles(name, facts))) for name in REQUIREMENTS),
    )


def _matrix(name: str, owned: list[str], quantized: QuantizedFolder) -> _Matrix:
    tensors = quantized.tensors
    scales = [key for key in owned if key.endswith(".scales")]
    rows = tuple(tensors.header(key)[1][1] for key in scales)
    channels = 2 * next(tensors.header(key)[1][1] for key in owned if re.search(r"[._]theta$", key))
    in_features = quantized.in_features.get(name, channels)
    return _Matrix(name, tuple(owned), sum(rows), in_features, channels, rows)


def _transform(matrix: _Matrix, tensors: TensorFiles) -> tuple[Tensor, Tensor, Tensor]:
    """theta, pairs and channel_scales."""
    theta, pairs, channel_scales = (
        next(tensors[key] for key in matrix.tensors if re.search(rf"[._]{part}$", key)) for part in TRANSFORM
    )
    return theta, pairs, channel_scales


def _sizes(kind: str, matrices: list[_Matrix], tensors: TensorFiles) -> ModuleSizes:
    found = Counter[str]()
    for matrix in matrices:
        for name in matrix.tensors:
            last = name.rpartition(".")[2]
            suffix = last if last in _PART_OF else next(part for part in TRANSFORM if last.endswith(f"_{part}"))
            found[_PART_OF[suffix]] += _nbytes(name, tensors)
    weights = sum(matrix.out * matrix.in_features for matrix in matrices)
    return ModuleSizes(kind, len(matrices), weights, {part: found[part] for part in PARTS})


def _numel(name: str, tensors: TensorFiles) -> int:
    return torch.Size(tensors.header(name)[1]).numel()


def _nbytes(name: str, tensors: TensorFiles) -> int:
    return _numel(name, tensors) * tensors.header(name)[0].itemsize


def _role(name: str) -> str:
    if "lm_head" in name:
        return "head"
    return "embeddings" if "embed" in name else "rest"


def _other_bytes(names: list[str], tensors: TensorFiles) -> dict[str, int]:
    found = Counter({"embeddings": 0, "head": 0, "rest": 0})
    for name in names:
        found[_role(name)] += _nbytes(name, tensors)
    return dict(found)


def _layout(matrices: list[_Matrix], tensors: TensorFiles) -> str:
    if not older_layouts.is_older(matrices[0].name, tensors):
        return PRESENT
    native = any(name.endswith("scaled_zeros") for name in matrices[0].tensors)
    return NATIVE if native else INTERMEDIATE


def _zero_points(quantized: QuantizedFolder, matrices: list[_Matrix], layout: str) -> tuple[int, ...]:
    counts = torch.zeros(2**quantized.bits, dtype=torch.long)
    if layout != PRESENT:
        for weight in quantized.values():
            counts += torch.bincount(weight.points.flatten(), minlength=len(counts))
        return tuple(counts.tolist())
    for matrix in matrices:
        zeros = [name for name in matrix.tensors if name.endswith(".qzeros")]
        for name, out in zip(zeros, matrix.rows_of_pieces, strict=True):
            points = unpack(quantized.tensors[name], quantized.bits, out)
            counts += torch.bincount(points.flatten(), minlength=len(counts))
    return tuple(counts.tolist())


def _angles(thetas: Iterable[Tensor]) -> Angles:
    values = torch.cat([theta.flatten() for theta in thetas]).double()
    if not len(values):
        return Angles(0.0, 0.0, 0.0, 1.0)
    size = values.abs()
    idle = (size == 0).double().mean()
    return Angles(values.square().mean().sqrt().item(), size.mean().item(), size.max().item(), idle.item())


def _shared(matrices: list[_Matrix], values: Mapping[str, tuple[Tensor, ...]]) -> float:
    """The part of the matrices whose values are also those of another one in their layer."""
    keys = {
        matrix.name: (
            matrix.name.removesuffix(matrix.kind),
            hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in values[matrix.name])).digest(),
            matrix.channels,
        )
        for matrix in matrices
    }
    counts = Counter(keys.values())
    return sum(counts[key] > 1 for key in keys.values()) / len(matrices)


@dataclass(frozen=True)
class _Facts:
    bits: int
    group_size: int
    rounds: int
    layout: str
    model_type: str
    matrices: tuple[_Matrix, ...]


# What each reader of the format needs, from its code; (rounds, group sizes, experts).
REQUIREMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "paroquant (transformers, CUDA)": ((1, 8), (128,), False),
    "paroquant (vLLM plugin)": ((1, 8), (128,), False),
    "paroquant (MLX)": (tuple(range(1, 17)), (128,), True),
    "GPTQModel": (tuple(range(1, 17)), (32, 64, 128), True),
}


def _obstacles(reader: str, facts: _Facts) -> Iterable[str]:
    """Why a reader cannot load the checkpoint."""
    rounds, group_sizes, experts = REQUIREMENTS[reader]
    if facts.layout != PRESENT:
        yield f"{facts.layout} layout, not the present one"
    if facts.bits != 4:
        yield f"{facts.bits} bits, not 4"
    if facts.group_size not in group_sizes:
        yield f"groups of {facts.group_size}, not {' or '.join(map(str, group_sizes))}"
    if facts.rounds not in rounds:
        yield f"{facts.rounds} rotation rounds, not {_range(rounds)}"
    if not experts and any(is_experts(matrix.name) for matrix in facts.matrices):
        yield "quantized experts"
    if any(matrix.in_features != matrix.channels for matrix in facts.matrices):
        yield "input channels filled up to whole groups"
    if any(rows % 8 for matrix in facts.matrices for rows in matrix.rows_of_pieces):
        yield "outputs filled up to whole words"
    if facts.model_type in OWN_ARCHITECTURES:
        yield f"architecture {facts.model_type}, which it does not know"


def _range(values: tuple[int, ...]) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 2 else " or ".join(map(str, values))
