"""Tiny models of five architectures, and their matrices quantized by rounding under random transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from luthier.models.instella_config import InstellaConfig
from luthier.quantize.affine import encode, grid
from luthier.quantize.pairs import round_robin_pairs
from luthier.quantize.rotation import rotate
from luthier.quantize.weights import QuantizedWeight, padded

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, head_dim=16, **EXPERTS),
    "instella": lambda: InstellaConfig(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
}


def quantize_by_rounding(
    weight: Tensor, *, bits: int = 4, group_size: int = 32, rounds: int = 4, seed: int = 0
) -> QuantizedWeight:
    """A matrix (out, in) rounded after a random transform of its input channels."""
    draw = torch.Generator().manual_seed(seed)
    in_features = weight.shape[1]
    channels = padded(in_features, group_size)
    pairs, _ = round_robin_pairs(channels, group_size=group_size, rounds=rounds, seed=seed)
    theta = (0.4 * torch.randn(rounds, channels // 2, generator=draw)).half()
    scales = (0.3 * torch.randn(channels, generator=draw)).exp().half()
    rotated = rotate(
        pad(weight.float(), (0, channels - in_features)) / scales.float(),
        torch.from_numpy(pairs),
        theta.float(),
        group_size=group_size,
    )
    grouped = rotated.view(len(weight), -1, group_size)
    step, zero = grid(grouped, bits)
    step = step.half().float()
    codes, points = encode(grouped, step, zero, bits)
    return QuantizedWeight(
        codes=codes.view(len(weight), channels),
        points=points[..., 0],
        steps=step[..., 0].half(),
        theta=theta,
        pairs=torch.from_numpy(pairs),
        channel_scales=scales,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


def quantize_model(model: PreTrainedModel, **settings: int) -> dict[str, QuantizedWeight]:
    """Every linear module and stack of experts in the layers of a model."""
    weights = {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            weights[name] = parameter.detach().flatten(0, 1)
    return {
        name: quantize_by_rounding(weight, seed=seed, **settings)
        for seed, (name, weight) in enumerate(sorted(weights.items()))
    }


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, larger than transformers' so that rounding shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="session")
def by_rounding() -> Callable[..., QuantizedWeight]:
    """`by_rounding(weight, bits=…, group_size=…, rounds=…, seed=…)` quantizes one matrix."""
    return quantize_by_rounding


@pytest.fixture(scope="session")
def model_by_rounding() -> Callable[..., dict[str, QuantizedWeight]]:
    """`model_by_rounding(model, …)` quantizes a model's layers."""
    return quantize_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder("qwen3")` is the folder of a random model of that kind; do not write into it."""
    made = dict[str, Path]()

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("source") / kind
            make_model(kind).save_pretrained(made[kind])
        return made[kind]

    return folder
