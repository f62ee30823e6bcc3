"""Logits against a naive float64 model that shares no code with the package: plain loops over tokens and heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

SETTINGS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def reference_norm(vector: Tensor, scale: Tensor) -> Tensor:
    return vector / math.sqrt(sum(value * value for value in vector.tolist()) / len(vector) + 1e-5) * scale


def reference_rotation(head: Tensor, position: int, theta: float) -> Tensor:
    half = len(head) // 2
    rotated = head.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / len(head))
        low, high = head[j].item(), head[j + half].item()
        rotated[j] = low * math.cos(angle) - high * math.sin(angle)
        rotated[j + half] = high * math.cos(angle) + low * math.sin(angle)
    return rotated


def reference_attention(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], groups: int) -> list[Tensor]:
    """Causal attention of per-token (heads, size) tensors; head h reads key-value head h // groups."""
    outputs = []
    for t, query in enumerate(queries):
        heads = []
        for h in range(len(query)):
            scores = torch.stack([query[h] @ keys[s][h // groups] / math.sqrt(query.shape[1]) for s in range(t + 1)])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            heads.append(sum(weights[s] * values[s][h // groups] for s in range(t + 1)))
        outputs.append(torch.cat(heads))
    return outputs


def reference_logits(weights: dict[str, Tensor], tokens: list[int], heads: int, kv_heads: int, theta: float) -> Tensor:
    """(tokens, vocabulary) in float64."""
    w = {name: weight.double() for name, weight in weights.items()}
    stream = [w["model.embed_tokens.weight"][token] for token in tokens]
    size = len(stream[0]) // heads
    layer = 0
    while f"model.layers.{layer}.mlp.up_proj.weight" in w:
        p = f"model.layers.{layer}."
        queries, keys, values = [], [], []
        for position, x in enumerate(stream):
            h = reference_norm(x, w[p + "pre_attention_layernorm.weight"])
            q = reference_norm(w[p + "self_attn.q_proj.weight"] @ h, w[p + "self_attn.q_norm.weight"])
            k = reference_norm(w[p + "self_attn.k_proj.weight"] @ h, w[p + "self_attn.k_norm.weight"])
            v = w[p + "self_attn.v_proj.weight"] @ h
            queries.append(torch.stack([reference_rotation(head, position, theta) for head in q.split(size)]))
            keys.append(torch.stack([reference_rotation(head, position, theta) for head in k.split(size)]))
            values.append(v.view(kv_heads, size))
        attended = reference_attention(queries, keys, values, heads // kv_heads)
        for position, output in enumerate(attended):
            x = stream[position] + w[p + "self_attn.o_proj.weight"] @ output
            h = reference_norm(x, w[p + "pre_feedforward_layernorm.weight"])
            gate = w[p + "mlp.gate_proj.weight"] @ h
            inner = gate / (1 + (-gate).exp()) * (w[p + "mlp.up_proj.weight"] @ h)
            stream[position] = x + w[p + "mlp.down_proj.weight"] @ inner
        layer += 1
    return torch.stack([w["lm_head.weight"] @ reference_norm(x, w["model.norm.weight"]) for x in stream])


def random_model(**settings: Any) -> InstellaForCausalLM:
    """Weights large enough that every part matters, norm scales away from 1."""
    model = InstellaForCausalLM(InstellaConfig(**(SETTINGS | settings))).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1))
    return model


@pytest.mark.parametrize(("kv_heads", "theta"), [(4, 10000.0), (2, 10000.0), (4, 3_691_950.0)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_equal_the_naive_model(kv_heads: int, theta: float, attention: str) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    model = random_model(num_key_value_heads=kv_heads, rope_parameters=rope)
    model.set_attn_implementation(attention)
    tokens = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(4))
    expected = reference_logits(model.state_dict(), tokens.tolist(), 4, kv_heads, theta)
    assert expected.std() > 1, "the comparison is not about zeros"
    # float32 carries about 7 digits; logits here reach the tens.
    torch.testing.assert_close(model(tokens[None]).logits[0].double(), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(model.double()(tokens[None]).logits[0], expected, atol=5e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_stays_near_the_naive_model() -> None:
    model = random_model().to(torch.bfloat16)
    tokens = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(4))
    expected = reference_logits(model.state_dict(), tokens.tolist(), 4, 4, 10000.0)
    difference = (model(tokens[None]).logits[0].double() - expected).abs().mean()
    assert difference < 0.05 * expected.std()
