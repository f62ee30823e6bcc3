"""What inspect says of folders whose content is known."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.core.errors import CheckpointError
from luthier.quantize.checkpoint import write_checkpoint
from luthier.quantize.inspect import Inspection, inspect_checkpoint
from luthier.quantize.weights import QuantizedWeight

Folder = Callable[[str], Path]
Quantize = Callable[..., dict[str, QuantizedWeight]]


def inspected(source: Path, out: Path, quantized: Mapping[str, QuantizedWeight]) -> Inspection:
    options: dict[str, Any] = {"config_extra": {}, "dtype": torch.float16, "provenance": {}}
    write_checkpoint(source, out, quantized, **options)
    return inspect_checkpoint(out)


def test_sizes_and_distributions(tiny_folder: Folder, model_by_rounding: Quantize, tmp_path: Path) -> None:
    quantized = model_by_rounding(AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3")), rounds=8)
    scales, pairs, theta = quantized["model.layers.0.self_attn.q_proj"].transform()
    name = "model.layers.0.self_attn.k_proj"  # as if trained together
    quantized[name] = dataclasses.replace(quantized[name], channel_scales=scales, pairs=pairs, theta=theta)
    found = inspected(tiny_folder("qwen3"), tmp_path / "out", quantized)
    assert (found.bits, found.group_size, found.rounds, found.layout) == (4, 32, 8, "present")
    assert {group.kind: group.modules for group in found.groups} == {
        **{f"self_attn.{part}_proj": 2 for part in "qkvo"},
        **{f"mlp.{part}_proj": 2 for part in ("gate", "up", "down")},
    }
    down = next(group for group in found.groups if group.kind == "mlp.down_proj")
    assert down.weights == 2 * 64 * 128
    assert down.bits("codes") == 4
    assert down.bits("steps") == 16 / 32
    assert down.bits("zero points") == 4 / 32
    assert [down.bits(part) * 64 for part in ("theta", "pairs", "channel scales")] == [64, 128, 16]
    assert down.total_bits == pytest.approx(4 + 20 / 32 + 208 / 64)
    assert down.metadata_bits == pytest.approx(down.total_bits - 4)
    assert found.body.modules == 14
    assert found.body.weights == sum(weight.codes.numel() for weight in quantized.values())
    assert found.other_bytes["embeddings"] == 2 * 96 * 64
    assert found.other_bytes["head"] == 0
    assert found.tied_head
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(found.other_bytes.values()) + sum(found.body.bytes.values()) == sum(t.nbytes for t in tensors.values())
    assert found.file_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert found.bits_per_parameter == 8 * found.file_bytes / (found.body.weights + found.other_parameters)
    points = torch.cat([weight.points.flatten() for weight in quantized.values()])
    assert found.zero_points == tuple(torch.bincount(points, minlength=16).tolist())
    theta = torch.cat([weight.theta.flatten() for weight in quantized.values()]).double()
    assert found.angles.rms == pytest.approx(theta.square().mean().sqrt().item())
    assert found.angles.largest == theta.abs().max()
    assert found.shared_pairs == found.shared_transforms == 2 / 14


def test_experts_and_an_own_head(tiny_folder: Folder, model_by_rounding: Quantize, tmp_path: Path) -> None:
    quantized = model_by_rounding(AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3-moe")))
    found = inspected(tiny_folder("qwen3-moe"), tmp_path / "out", quantized)
    experts = next(group for group in found.groups if group.kind == "mlp.experts.gate_up_proj")
    assert (experts.modules, experts.weights) == (1, 4 * 64 * 64)
    assert experts.bits("theta") == 16 * 4 * 32 / experts.weights
    assert found.other_bytes["head"] == found.other_bytes["embeddings"]
    assert not found.tied_head
    assert found.shared_pairs == 0


def readers(found: Inspection) -> dict[str, tuple[str, ...]]:
    return {reader.name: reader.reasons for reader in found.readers}


def test_who_can_load_it(by_rounding: Callable[..., QuantizedWeight], tiny_folder: Folder, tmp_path: Path) -> None:
    name, weight = "model.layers.0.mlp.down_proj", torch.randn(64, 128)
    source = tiny_folder("olmo2")
    good = readers(inspected(source, tmp_path / "a", {name: by_rounding(weight, group_size=128, rounds=8)}))
    assert len(good) == 4
    assert not any(good.values())
    four = readers(inspected(source, tmp_path / "b", {name: by_rounding(weight, group_size=128, rounds=4)}))
    assert four["paroquant (transformers, CUDA)"] == ("4 rotation rounds, not 1 or 8",)
    assert four["paroquant (MLX)"] == four["GPTQModel"] == ()
    own = readers(inspected(source, tmp_path / "c", {name: by_rounding(weight, bits=3, rounds=0)}))
    assert own["paroquant (vLLM plugin)"] == ("3 bits, not 4", "groups of 32, not 128", "0 rotation rounds, not 1 or 8")
    assert own["GPTQModel"] == ("3 bits, not 4", "0 rotation rounds, not 1 to 16")
    odd = by_rounding(torch.randn(128, 64), group_size=128, rounds=8)
    padded = readers(inspected(source, tmp_path / "d", {"model.layers.0.mlp.up_proj": odd}))
    assert set(padded.values()) == {("input channels filled up to whole groups",)}


def test_instella_and_experts_are_not_for_everybody(
    tiny_folder: Folder, model_by_rounding: Quantize, tmp_path: Path
) -> None:
    for kind, reasons in (
        ("instella", ("architecture instella, which it does not know",)),
        ("qwen3-moe", ("quantized experts",)),
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder(kind))
        found = inspected(tiny_folder(kind), tmp_path / kind, model_by_rounding(model, group_size=128, rounds=8))
        assert (
            readers(found)["paroquant (vLLM plugin)"]
            == ("input channels filled up to whole groups", *reasons)[:: 1 if kind == "instella" else -1]
        )


def test_damage_is_named(tiny_folder: Folder, model_by_rounding: Quantize, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantization method none"):
        inspect_checkpoint(tiny_folder("olmo2"))
    quantized = model_by_rounding(AutoModelForCausalLM.from_pretrained(tiny_folder("olmo2")))
    inspected(tiny_folder("olmo2"), tmp_path / "good", quantized)
    for part in ("theta", "scales", "qzeros", "pairs"):
        shutil.copytree(tmp_path / "good", tmp_path / part)
        tensors = load_file(tmp_path / part / "model.safetensors")
        del tensors[f"model.layers.1.mlp.up_proj.{part}"]
        save_file(tensors, tmp_path / part / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"up_proj.{part}: missing"):
            inspect_checkpoint(tmp_path / part)
