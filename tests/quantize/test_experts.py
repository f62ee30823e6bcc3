"""Quantized experts against transformers' fused experts with decoded weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from luthier.core.errors import CheckpointError
from luthier.quantize.experts import RotatedExperts
from luthier.quantize.sharing import prepare
from luthier.quantize.tensors import headers_of, to_tensors
from luthier.quantize.weights import QuantizedWeight

ByRounding = Callable[..., QuantizedWeight]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
STACKS = ("gate_up_proj", "down_proj")


def make(by_rounding: ByRounding, dtype: torch.dtype, **settings: int) -> tuple[nn.Module, RotatedExperts]:
    """transformers' experts with decoded weights in fp32, and ours."""
    config = Qwen3MoeConfig(num_experts=4, hidden_size=72, moe_intermediate_size=40, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    fused = Qwen3MoeExperts(config)
    weights = {}
    for seed, name in enumerate(STACKS):
        parameter = getattr(fused, name)
        weights[name] = by_rounding(0.3 * torch.randn(*parameter.shape).flatten(0, 1), seed=seed, **settings)
        parameter.data = weights[name].dequantized().view(parameter.shape)
    return fused, RotatedExperts.from_weights(weights, 4, fused.act_fn, dtype)


def route(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]) if tokens else torch.empty(0, 2).long()
    return torch.randn(tokens, 72, dtype=dtype), chosen, torch.rand(tokens, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 30])
@torch.no_grad()
def test_output_agrees_with_fused_experts(by_rounding: ByRounding, dtype: torch.dtype, bits: int, tokens: int) -> None:
    fused, ours = make(by_rounding, dtype, bits=bits)
    x, chosen, weights = route(tokens, dtype)
    y, want = ours(x, chosen, weights), fused(x.float(), chosen, weights.float())
    assert y.shape == want.shape
    assert y.dtype == dtype
    if tokens:
        assert (y.float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@torch.no_grad()
def test_a_place_without_an_expert_adds_nothing(by_rounding: ByRounding) -> None:
    _, ours = make(by_rounding, torch.float32)
    x, chosen, weights = route(3, torch.float32)
    both = ours(x, chosen, weights)
    first, second = chosen.clone(), chosen.clone()
    first[:, 1], second[:, 0] = 4, 4
    torch.testing.assert_close(ours(x, first, weights) + ours(x, second, weights), both)


@torch.no_grad()
def test_tokens_are_rotated_once(by_rounding: ByRounding, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = make(by_rounding, torch.bfloat16)
    runners = ours.runners(torch.bfloat16)
    calls = []
    rotate = type(runners[0]).rotate
    monkeypatch.setattr(type(runners[0]), "rotate", lambda self, x: calls.append(x.shape[-1]) or rotate(self, x))
    ours(*route(20, torch.bfloat16))
    assert calls.count(72) == 1
    assert calls.count(40) == 4
    assert runners[0].rotation is runners[3].rotation is not runners[4].rotation


def test_gradient_of_the_input(by_rounding: ByRounding) -> None:
    fused, ours = make(by_rounding, torch.float32)
    x, chosen, weights = route(9, torch.float32)
    gradients = []
    for module in (fused, ours):
        leaf = x.clone().requires_grad_()
        module(leaf, chosen, weights).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_buffers_are_the_tensors_of_a_checkpoint_and_survive_half(by_rounding: ByRounding) -> None:
    fused, ours = make(by_rounding, torch.float32)
    empty = RotatedExperts.like(fused, dtype=torch.float32, bits=4, group_size=32, rounds=4)
    want = {}
    for stack in STACKS:
        want |= to_tensors(f"experts.{stack}", ours.quantized_weight(stack), 4)
    want = {name.removeprefix("experts."): tensor for name, tensor in want.items()}
    for module in (ours, empty, ours.bfloat16()):
        assert headers_of(module.state_dict()) == headers_of(want)
    assert ours.dtype == torch.bfloat16
    assert all(torch.equal(tensor, want[name]) for name, tensor in ours.state_dict().items())


def test_prepare_packs_every_expert(by_rounding: ByRounding) -> None:
    _, ours = make(by_rounding, torch.bfloat16)
    assert "8 x int4" in prepare(nn.ModuleList([ours]))


def test_other_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear: experts of a form"):
        RotatedExperts.like(nn.Linear(2, 2), dtype=torch.float32, bits=4, group_size=32, rounds=4)
