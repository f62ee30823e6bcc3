"""Siblings that share a product give what they give alone, and never an old result."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from luthier.quantize.linear import RotatedLinear
from luthier.quantize.sharing import PATIENCE, prepare
from luthier.quantize.weights import QuantizedWeight

ByRounding = Callable[..., QuantizedWeight]


class Attention(nn.Module):
    """q, k, v with one transform, of different heights, and o with its own."""

    def __init__(self, by_rounding: ByRounding, dtype: torch.dtype, biases: bool = True) -> None:
        super().__init__()
        first = by_rounding(torch.randn(64, 64), seed=1)
        self.alone: dict[str, RotatedLinear] = {}
        for name, rows in {"q": 64, "k": 24, "v": 24, "o": 64}.items():
            weight = by_rounding(torch.randn(rows, 64), seed=1 if name != "o" else 2)
            if name != "o":
                weight = replace(weight, theta=first.theta, channel_scales=first.channel_scales)
            bias = torch.randn(rows) if biases else None
            setattr(self, name, RotatedLinear.from_weight(weight, bias, dtype))
            self.alone[name] = RotatedLinear.from_weight(weight, bias, dtype)

    def same(self, name: str, x: Tensor) -> bool:
        """Whether a module gives what it gives alone."""
        return torch.allclose(getattr(self, name)(x).float(), self.alone[name](x).float(), atol=1e-2, rtol=1e-2)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def attention(request: pytest.FixtureRequest, by_rounding: ByRounding) -> Attention:
    module = Attention(by_rounding, request.param)
    module.said = prepare(module)
    return module


def draw(attention: Attention, *shape: int) -> Tensor:
    return torch.randn(*shape, 64, dtype=attention.q.dtype)


def test_equal_transforms_share_and_others_do_not(attention: Attention) -> None:
    assert attention.q.shared is attention.k.shared is attention.v.shared is not None
    assert attention.o.shared is None
    assert "3 modules share" in attention.said
    assert "2 x" in attention.said


@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 300)])
@torch.no_grad()
def test_parts_equal_products_alone(attention: Attention, shape: tuple[int, ...]) -> None:
    for order in ("qkvo", "vqok", "kvq"):
        x = draw(attention, *shape)
        assert all(attention.same(name, x) for name in order)
        assert attention.q(x).is_contiguous()


@torch.no_grad()
def test_one_product_serves_all(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = attention.q.shared.runner(attention.q.dtype)
    calls = []
    whole = runner.multiply
    monkeypatch.setattr(runner, "multiply", lambda x: calls.append(1) or whole(x))
    x = draw(attention, 2)
    for name in "qkv":
        getattr(attention, name)(x)
    assert len(calls) == 1


@torch.no_grad()
def test_an_input_changed_in_place_is_computed_again(attention: Attention) -> None:
    x = draw(attention, 2)
    attention.q(x)
    x.mul_(-3)
    assert attention.same("k", x)
    assert attention.same("v", x)


@torch.no_grad()
def test_an_equal_looking_new_tensor_is_computed_again(attention: Attention) -> None:
    for _ in range(20):  # memory, and so ids, are used again
        x = draw(attention, 1)
        attention.q(x)
        del x
        x = draw(attention, 1)
        assert attention.same("k", x)
        del x


@torch.no_grad()
def test_calling_one_module_twice(attention: Attention) -> None:
    x = draw(attention, 2)
    assert all(attention.same("q", x) for _ in range(3 * PATIENCE))
    assert attention.same("k", x)


def test_inference_mode_and_gradients(attention: Attention) -> None:
    with torch.inference_mode():
        x = draw(attention, 2)
        assert attention.same("q", x)
        x.mul_(2)
        assert attention.same("k", x)
    x = draw(attention, 2).requires_grad_()
    sum(getattr(attention, name)(x).float().square().sum() for name in "qkv").backward()
    wanted = x.detach().clone().requires_grad_()
    sum(attention.alone[name](wanted).float().square().sum() for name in "qkv").backward()
    assert torch.allclose(x.grad, wanted.grad)


@torch.no_grad()
def test_nothing_is_held_once_all_parts_are_taken(attention: Attention) -> None:
    x = draw(attention, 1)
    for name in "qkv":
        getattr(attention, name)(x)
    assert attention.q.shared._pending is None
    attention.q(x := draw(attention, 1))
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


@torch.no_grad()
def test_a_module_with_another_input_leaves(by_rounding: ByRounding) -> None:
    module = nn.Module()
    for name in ("q", "k", "o"):
        weight = by_rounding(torch.randn(64, 64), rounds=0, seed=1)
        setattr(module, name, RotatedLinear.from_weight(weight, None, torch.bfloat16))
    prepare(module)
    assert module.q.shared is module.o.shared
    for _ in range(2 * PATIENCE + 2):
        x, y = (torch.randn(1, 64).bfloat16() for _ in range(2))
        module.q(x), module.k(x), module.o(y)
    assert module.o.shared is None
    assert module.q.shared is module.k.shared is not None


@torch.no_grad()
def test_new_weights_end_the_sharing_until_prepared_again(attention: Attention) -> None:
    x = draw(attention, 2)
    other = attention.alone["o"].state_dict()
    attention.q(x)
    attention.q.load_state_dict(other)
    assert torch.allclose(attention.q(x), attention.alone["o"](x))
    assert attention.same("k", x)
    assert attention.k.shared is None
    prepare(attention)
    assert attention.k.shared is attention.v.shared is not None


def test_a_model_without_quantized_modules() -> None:
    assert prepare(nn.Linear(2, 2)) == "no quantized modules"
