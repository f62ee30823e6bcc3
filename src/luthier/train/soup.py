"""The mean of several models' weights, arXiv 2511.10628 (spec: section 2.5): stage 2 under three seeds makes one model.

A tensor is read from one member after another, added up in fp32, divided once and rounded once to the dtype in which it
is stored. So one tensor of one member, its sum and one shard of the result are in memory, whatever the models' size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_folder, read_json
from luthier.models.load import shorten, write_provenance
from luthier.models.tensor_files import SHARD_BYTES, ShardWriter, TensorFiles, copy_other_files

# What may differ in config.json: who wrote it, and where it was read from.
UNIMPORTANT = ("_name_or_path", "transformers_version", "auto_map")
SAME_RECIPE = "average models that were trained from one start with one tokenizer"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model folder that goes into the mean. `tokenizer` is its digest, '' where the folder has none."""

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFiles
    tokenizer: str

    @classmethod
    def open(cls, folder: Path, tokenizer: str) -> Member:
        """Read config.json and the headers of the weights. CheckpointError when they are missing or damaged."""
        tensors = TensorFiles.of_folder(folder)
        return cls(folder=folder, config=read_json(folder / "config.json"), tensors=tensors, tokenizer=tokenizer)


def weighted_mean(tensors: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share · tensor / Σ share, summed in fp32 (fp64 for fp64), rounded once to the dtype of the tensors.

    Tensors are taken one by one; all have one shape and dtype.
    """
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        dtype = tensor.dtype
        wide = tensor.to(torch.promote_types(dtype, torch.float32))
        total = wide * share if total is None else total.add_(wide, alpha=share)
    if total is None:
        raise ValueError("the mean of no tensors")
    return total.div_(sum(shares)).to(dtype)


def mean_tensors(members: Sequence[Member], shares: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the mean by name. CheckpointError for integers that differ, which have no mean."""
    for name in members[0].tensors:
        if members[0].tensors.header(name)[0].is_floating_point:
            yield name, weighted_mean((member.tensors[name] for member in members), shares)
            continue
        first = members[0].tensors[name]
        if not all(torch.equal(first, member.tensors[name]) for member in members[1:]):
            raise CheckpointError(f"{name}: integers that differ between the models", hint=SAME_RECIPE)
        yield name, first


def check_alike(members: Sequence[Member]) -> None:
    """CheckpointError naming what differs when the members are not models of one shape, type and tokenizer."""
    first = members[0]
    if first.config.get("quantization_config"):
        raise CheckpointError(f"{first.folder}: is quantized; codes have no mean", hint="average the original models")
    for other in members[1:]:
        found = [*_config_differences(first, other), *_tensor_differences(first, other)]
        if first.tokenizer != other.tokenizer:
            found.append("another tokenizer")
        if found:
            raise CheckpointError(
                f"{other.folder} does not fit {first.folder}: {'; '.join(found)}",
                hint=SAME_RECIPE,
            )


def _config_differences(first: Member, other: Member) -> list[str]:
    keys = [key for key in {**first.config, **other.config} if key not in UNIMPORTANT]
    return [
        f"{key} is {other.config.get(key)}, not {first.config.get(key)}"
        for key in keys
        if first.config.get(key) != other.config.get(key)
    ]


def _tensor_differences(first: Member, other: Member) -> list[str]:
    names, others = set(first.tensors), set(other.tensors)
    unlike = [
        f"{name} ({_header(other, name)}, not {_header(first, name)})"
        for name in sorted(names & others)
        if first.tensors.header(name) != other.tensors.header(name)
    ]
    kinds = {"tensors missing": sorted(names - others), "tensors too many": sorted(others - names), "unlike": unlike}
    return [f"{len(found)} {kind}: {shorten(found)}" for kind, found in kinds.items() if found]


def _header(member: Member, name: str) -> str:
    dtype, shape = member.tensors.header(name)
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def soup(
    members: Sequence[Member],
    shares: Sequence[float],
    out: Path,
    provenance: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the mean of the members as the model folder `out`, whole or not at all, and return its parameters.

    Whatever is neither weights nor provenance (config.json, tokenizer, chat template) is the first member's.
    CheckpointError when the members are not alike.
    """
    check_alike(members)
    parameters = 0
    with atomic_folder(out) as folder:
        shards = ShardWriter(folder, shard_bytes)
        for name, tensor in mean_tensors(members, shares):
            shards.add(name, tensor)
            parameters += tensor.numel()
        shards.close()
        source = members[0].folder
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        copy_other_files(source, folder)
        write_provenance(folder, provenance)
    return parameters
