"""Folders of quantized models: read them matrix by matrix, write them tensor by tensor.

Neither direction holds more than one shard and one layer in memory. `to_tensors` and `from_tensors` are the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_folder, read_json, write_json
from luthier.models.load import write_provenance
from luthier.models.tensor_files import SHARD_BYTES, ShardWriter, TensorFiles, copy_other_files, natural
from luthier.quantize import older_layouts
from luthier.quantize.tensors import (
    EXPERT_PARTS,
    EXPERT_TRANSFORMS,
    MATRIX,
    TRANSFORM,
    check_headers,
    count_experts,
    expected,
    from_tensors,
    is_experts,
    pieces,
    to_tensors,
    transform_names,
)
from luthier.quantize.weights import QuantizedWeight

QUANT_METHOD = "paroquant"
_STACK_OF = {part: stack for stack, parts in EXPERT_PARTS.items() for part in parts}
_EXPERT = re.compile(rf"(.*\.experts)\.\d+\.({'|'.join(_STACK_OF)})\.(.*)")
_EXPERT_TRANSFORM = re.compile(rf"(.*\.experts)\.({'|'.join(EXPERT_TRANSFORMS.values())})_({'|'.join(TRANSFORM)})")
_STACK_OF |= {prefix: stack for stack, prefix in EXPERT_TRANSFORMS.items()}


def quantization_settings(folder: Path) -> dict[str, Any]:
    """`quantization_config` of a folder's config.json, checked; CheckpointError when it is of another method."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        got = settings.get("quant_method") if isinstance(settings, dict) else "none"
        raise CheckpointError(
            f"{folder}: quantization method {got}, expected {QUANT_METHOD}",
            hint="give the folder that `luthier quantize` wrote, or another ParoQuant checkpoint",
        )
    return settings


class QuantizedFolder(Mapping[str, QuantizedWeight]):
    """The quantized matrices of a model folder by module name, in any of the three layouts; read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.tensors = TensorFiles.of_folder(folder)
        settings = quantization_settings(folder)
        self.bits, self.group_size = int(settings.get("bits", 4)), int(settings.get("group_size", 128))
        self.in_features: Mapping[str, int] = settings.get("in_features", {})  # of matrices with padding
        owners = (owner(name, self.tensors) for name in self.tensors if name.endswith(".qweight"))
        self.names = dict.fromkeys(name for name in owners if name is not None)
        if not self.names:
            raise CheckpointError(
                f"{folder}: no tensor of it ends in .qweight", hint="the model is not quantized, or files are missing"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> QuantizedWeight:
        if name not in self.names:
            raise KeyError(name)
        if older_layouts.is_older(name, self.tensors):
            return older_layouts.read(name, self.tensors, self.group_size)
        rows, in_features = self.shape(name)
        return from_tensors(name, self.tensors, rows, in_features, self.bits, self.group_size)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) without padding, `out` over all experts. For the present layout."""
        experts = count_experts(name, self.tensors)
        matrices = [piece for piece, _ in pieces(name, 1, experts)]
        if f"{matrices[0]}.scales" not in self.tensors:
            raise CheckpointError(f"{matrices[0]}.scales: missing", hint="write or copy the checkpoint again")
        groups, out = self.tensors.header(f"{matrices[0]}.scales")[1]
        return out * len(matrices), self.in_features.get(name, groups * self.group_size)

    def check(self, name: str) -> None:
        """CheckpointError when a tensor of a matrix in the present layout is missing or does not fit the others."""
        rows, in_features = self.shape(name)
        experts = count_experts(name, self.tensors)
        transform = [key for key in transform_names(name, experts) if key in self.tensors]
        want = expected(
            name,
            out_features=rows,
            in_features=in_features,
            bits=self.bits,
            group_size=self.group_size,
            rounds=self.tensors.header(transform[0])[1][0] if transform else 0,
            experts=experts,
        )
        check_headers(want, {key: self.tensors.header(key) for key in want if key in self.tensors})


def read_quantized(folder: Path) -> QuantizedFolder:
    """The quantized matrices of a model folder by module name, in any of the three layouts; read when asked for.

    CheckpointError for a folder without any, and, at the matrix, for tensors that are missing or do not fit.
    """
    return QuantizedFolder(folder)


def owner(name: str, tensors: Mapping[str, Any]) -> str | None:
    """The quantized matrix that a checkpoint's tensor is a part of, None for an ordinary tensor.

    With experts that have their own transforms each, their matrices are single ones.
    """
    if transform := _EXPERT_TRANSFORM.fullmatch(name):
        return f"{transform[1]}.{_STACK_OF[transform[2]]}"
    expert = _EXPERT.fullmatch(name)
    if expert and expert[3] in MATRIX and name.removesuffix(expert[3]) + "theta" not in tensors:
        return f"{expert[1]}.{_STACK_OF[expert[2]]}"
    if older := older_layouts.owner(name):
        return older
    prefix, _, last = name.rpartition(".")
    return prefix if last in (*MATRIX, *TRANSFORM) and f"{prefix}.qweight" in tensors else None


def write_checkpoint(
    source: Path,
    out: Path,
    quantized: Mapping[str, QuantizedWeight],
    *,
    config_extra: Mapping[str, Any],
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    pseudo: bool = False,
) -> None:
    """Write `source`, with the matrices of `quantized` (by module name) in place of its own, as the folder `out`.

    Each matrix is asked for once, in the order of the layers. The other tensors are cast to `dtype`; the source may be
    an ordinary model, or a quantized one in any layout. `pseudo` writes ordinary weights, dequantized, in the layout of
    the source. `config_extra` adds keys to `quantization_config`, `provenance` is the content of luthier.json.
    CheckpointError when the matrices do not fit the source or each other; `out` is then left as it was.
    """
    if source.resolve() == out.resolve():
        raise CheckpointError(f"{out}: is the source itself", hint="write the quantized model to another folder")
    tensors = TensorFiles.of_folder(source)
    config = read_json(source / "config.json")
    if config.get("quantization_config"):
        quantization_settings(source)
    plan = _plan(tensors, set(quantized), drop_head=config.get("tie_word_embeddings") is True)
    with atomic_folder(out) as folder:
        shards = ShardWriter(folder, shard_bytes)
        settings = dict[str, Any]()
        for name, names in plan:
            if name is None:
                shards.add(older_layouts.present_name(names[0]), _cast(names[0], tensors[names[0]], dtype))
                continue
            weight = quantized[name]
            _check_fit(name, weight, names, tensors)
            _check_alike(name, weight, settings)
            experts = _source_experts(name, names, tensors)
            new = _pseudo(name, weight, names, experts, dtype) if pseudo else to_tensors(name, weight, experts).items()
            for key, tensor in new:
                shards.add(key, tensor)
        shards.close()
        write_json(folder / "config.json", _config(config, settings, config_extra, dtype if pseudo else None))
        copy_other_files(source, folder)
        write_provenance(folder, provenance)


def _plan(tensors: TensorFiles, quantized: set[str], *, drop_head: bool) -> list[tuple[str | None, list[str]]]:
    """What to write, in natural order: (None, [a tensor to copy]) or (a quantized matrix, the tensors it replaces)."""
    groups = dict[str, tuple[str | None, list[str]]]()
    for name in filter(is_experts, sorted(quantized)):
        both = {f"{name.rpartition('.')[0]}.{stack}" for stack in EXPERT_PARTS}
        if not both <= quantized:
            raise CheckpointError(
                f"{name}: quantized without {(both - quantized).pop()}",
                hint="the layout has quantized experts only as a whole: quantize both, or add both to `skip`",
            )
    for name in tensors:
        if drop_head and name == "lm_head.weight":
            continue  # tied: a second copy of the embedding
        key = _replaced_by(name, quantized, tensors)
        if key is None and (other := owner(name, tensors)):
            raise CheckpointError(
                f"{other}: quantized in the source, but not among the matrices to write",
                hint="start from the model that is not quantized, or give all matrices of this one",
            )
        groups.setdefault(key or f"={name}", (key, []))[1].append(name)
    missing = sorted(quantized - {key for key, _ in groups.values() if key is not None}, key=natural)
    if missing:
        raise CheckpointError(
            f"{missing[0]}: quantized, but the source has no such weight (and {len(missing) - 1} more)",
            hint="use the model that was quantized; its files must have the names of transformers' modules",
        )
    return list(groups.values())


def _replaced_by(name: str, quantized: set[str], tensors: TensorFiles) -> str | None:
    key = owner(name, tensors)
    if key is None and (expert := _EXPERT.fullmatch(name)) and expert[3] == "weight":
        key = f"{expert[1]}.{_STACK_OF[expert[2]]}"
    for candidate in (key, name, name.removesuffix(".weight")):
        if candidate in quantized:
            return candidate
    return None


def _source_experts(name: str, names: list[str], tensors: TensorFiles) -> int:
    if not is_experts(name):
        return 0
    if names == [name]:
        return tensors.header(name)[1][0]
    return len({name.rpartition(".experts.")[2].split(".")[0] for name in names if _EXPERT.fullmatch(name)})


def _check_fit(name: str, weight: QuantizedWeight, names: list[str], tensors: TensorFiles) -> None:
    """CheckpointError unless the ordinary weights that a matrix replaces have its shape; quantized ones may differ."""
    shapes = [tensors.header(old)[1] for old in names]
    if any(owner(old, tensors) for old in names):
        return
    rows = sum(torch.Size(shape[:-1]).numel() for shape in shapes)
    if len(shapes[0]) > 2 and not is_experts(name):
        raise CheckpointError(
            f"{name}: a stack of matrices {shapes[0]}, and no `experts` module holds it",
            hint="the layout has a place for the fused experts of transformers' models only; add it to `skip`",
        )
    if (rows, {shape[-1] for shape in shapes}) != (weight.codes.shape[0], {weight.in_features}):
        raise CheckpointError(
            f"{name}: quantized as {(weight.codes.shape[0], weight.in_features)}, but the source has {shapes[0]}"
            + (f" in {len(shapes)} tensors" if len(shapes) > 1 else ""),
            hint="use the model that was quantized",
        )


def _check_alike(name: str, weight: QuantizedWeight, settings: dict[str, Any]) -> None:
    """Collect what config.json says of all matrices; CheckpointError when they do not agree."""
    own = {"bits": weight.bits, "group_size": weight.group_size, "krot": weight.rounds}
    for key, value in own.items():
        if settings.setdefault(key, value) != value:
            raise CheckpointError(
                f"{name}: {key} {value}, but other matrices have {settings[key]}",
                hint="a checkpoint has one setting for all: quantize them the same way",
            )
    if weight.in_features % weight.group_size:
        settings.setdefault("in_features", {})[name] = weight.in_features


def _pseudo(
    name: str, weight: QuantizedWeight, names: list[str], experts: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Dequantized weights under the source's names; a few experts at a time."""
    found = list(pieces(name, weight.codes.shape[0], experts))
    parts = (
        (piece, replace(weight, codes=weight.codes[rows], points=weight.points[rows], steps=weight.steps[rows]))
        for piece, rows in found
    )
    values = ((f"{piece}.weight", _cast(piece, part.dequantized(), dtype)) for piece, part in parts)
    if names == [name]:
        stacked = torch.cat([value for _, value in values])
        yield name, stacked.view(experts, -1, stacked.shape[-1])
    else:
        yield from values


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not cast.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(
            f"{name}: has a value of {tensor.abs().max():.3g}, which {str(dtype).removeprefix('torch.')} cannot hold",
            hint="write it with dtype bfloat16 or float32",
        )
    return cast


def _config(
    source: Mapping[str, Any], settings: Mapping[str, Any], extra: Mapping[str, Any], pseudo: torch.dtype | None
) -> dict[str, Any]:
    """The source's config; its dtype stays, as in the authors' files, but for pseudo weights, which it would round."""
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    if pseudo is None:
        return {**config, "quantization_config": {"quant_method": QUANT_METHOD, **settings, **extra}}
    return {**config, ("torch_dtype" if "torch_dtype" in config else "dtype"): str(pseudo).removeprefix("torch.")}
