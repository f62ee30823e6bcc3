"""Checkpoints of the original trainer (fused matrices, `transformer.*` names) to and from Hugging Face names.

The trainer stacks q, k and v into one matrix, and the MLP's two inputs into another: **up is its first half, gate its
second**. Shapes cannot reveal a swap of the two, so the tests compare random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_folder, sha256_file, write_json
from luthier.models.arithmetic import Dimensions, tensor_shapes
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import check_weight_files, shorten, write_provenance

OUTER_NAMES = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    "transformer.ff_out.weight": ["lm_head.weight"],
}
BLOCK_NAMES = {
    "attn_norm.weight": ["pre_attention_layernorm.weight"],
    "att_proj.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "q_norm.weight": ["self_attn.q_norm.weight"],
    "k_norm.weight": ["self_attn.k_norm.weight"],
    "attn_out.weight": ["self_attn.o_proj.weight"],
    "ff_norm.weight": ["pre_feedforward_layernorm.weight"],
    "ff_proj.weight": ["mlp.up_proj.weight", "mlp.gate_proj.weight"],
    "ff_out.weight": ["mlp.down_proj.weight"],
}


def trainer_layout(dimensions: Dimensions) -> dict[str, list[str]]:
    """Trainer name → the Hugging Face names of the row blocks that it stacks, from top to bottom."""
    layout = dict(OUTER_NAMES)
    if dimensions.tie_word_embeddings:
        del layout["transformer.ff_out.weight"]
    for layer in range(dimensions.num_hidden_layers):
        for name, parts in BLOCK_NAMES.items():
            layout[f"transformer.blocks.{layer}.{name}"] = [f"model.layers.{layer}.{part}" for part in parts]
    return layout


def trainer_to_hf(weights: Mapping[str, Tensor], dimensions: Dimensions) -> dict[str, Tensor]:
    """All tensors under Hugging Face names; CheckpointError when any is missing, unexpected or mis-shaped."""
    layout, shapes = trainer_layout(dimensions), tensor_shapes(dimensions)
    check_names(weights, layout)
    converted: dict[str, Tensor] = {}
    for name, parts in layout.items():
        converted |= split_rows(name, weights[name], {part: shapes[part] for part in parts})
    return converted


def hf_to_trainer(weights: Mapping[str, Tensor], dimensions: Dimensions) -> dict[str, Tensor]:
    """All tensors under trainer names; CheckpointError when any is missing, unexpected or mis-shaped."""
    shapes = tensor_shapes(dimensions)
    check_names(weights, shapes)
    for name, shape in shapes.items():
        check_shape(name, tuple(weights[name].shape), shape)
    return {name: torch.cat([weights[part] for part in parts]) for name, parts in trainer_layout(dimensions).items()}


def split_rows(name: str, weight: Tensor, parts: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """One trainer tensor as the Hugging Face tensors (name → shape) that it stacks, as contiguous copies."""
    rows = [shape[0] for shape in parts.values()]
    check_shape(name, tuple(weight.shape), (sum(rows), *next(iter(parts.values()))[1:]))
    return {
        part: block.clone(memory_format=torch.contiguous_format)
        for part, block in zip(parts, weight.split(rows), strict=True)
    }


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """CheckpointError naming the tensors that are missing or too many."""
    found, expected = set(found), set(expected)
    problems = [
        f"{len(names)} {kind}: {shorten(sorted(names))}"
        for kind, names in (("missing", expected - found), ("unexpected", found - expected))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the configuration: {'; '.join(problems)}",
            hint="check the number of layers, the tying of embeddings, and the direction of the conversion",
        )


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """CheckpointError unless the shapes are equal."""
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {found}, the configuration needs {expected}",
            hint="use the configuration that this checkpoint was trained with",
        )


def convert_to_hf(
    source: Path,
    folder: Path,
    config: InstellaConfig,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model folder from a trainer checkpoint (`.safetensors`, or `.pt` read without running code).

    Tensors pass through one shard at a time, so memory stays near `shard_bytes`. `dtype` casts (None: keep). The caller
    adds the tokenizer. CheckpointError when the checkpoint does not fit `config` or is damaged.
    """
    weights = open_checkpoint(source)
    layout, shapes = trainer_layout(config.dimensions), tensor_shapes(config.dimensions)
    check_names(weights, layout)
    config.architectures = ["InstellaForCausalLM"]
    config.dtype = dtype or weights["transformer.ln_f.weight"].dtype
    num_bytes = {
        name: sum(prod(shapes[part]) for part in parts) * config.dtype.itemsize for name, parts in layout.items()
    }
    shards = plan_shards(num_bytes, shard_bytes)
    files: dict[str, str] = {}
    with atomic_folder(folder) as temporary:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= split_rows(
                    name, weights[name].to(config.dtype), {part: shapes[part] for part in layout[name]}
                )
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": files}
            write_json(temporary / "model.safetensors.index.json", index)
        config.save_pretrained(temporary)
        write_provenance(temporary, {"verb": "convert", "parents": {source.name: sha256_file(source)}})


class _TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads each tensor when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def open_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """Tensors of one file by name, read lazily; CheckpointError when it is missing or damaged, or would run code."""
    try:
        if path.suffix == ".safetensors":
            return _TensorFile(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, UnpicklingError) as error:
        raise _unreadable(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    if not isinstance(weights, Mapping):
        raise _unreadable(path, f"it holds a {type(weights).__name__}, not tensors by name")
    return weights


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable checkpoint ({reason})",
        hint="give the trainer's unsharded model.safetensors or model.pt, complete",
    )


def convert_to_trainer(folder: Path, target: Path) -> None:
    """Write a model folder's weights as one trainer checkpoint in safetensors; needs memory for all of them."""
    check_weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    save_file(hf_to_trainer(weights, InstellaConfig.from_pretrained(folder).dimensions), target, {"format": "pt"})


def plan_shards(num_bytes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names grouped in order so that each group stays within `limit` bytes, or holds a single larger tensor."""
    shards: list[list[str]] = []
    used = 0
    for name, size in num_bytes.items():
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
