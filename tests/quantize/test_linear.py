"""The quantized linear module against the decoded weights, in every dtype, width and shape."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from luthier.core.errors import CheckpointError
from luthier.quantize.kernels import native
from luthier.quantize.linear import RotatedLinear
from luthier.quantize.tensors import headers_of, to_tensors
from luthier.quantize.weights import QuantizedWeight

ByRounding = Callable[..., QuantizedWeight]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def check(weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """The module's product agrees with the oracle, relative to the largest output."""
    module = RotatedLinear.from_weight(weight, bias, x.dtype)
    with torch.no_grad():
        y = module(x)
    rounded = None if bias is None else bias.to(x.dtype).float()
    want = nn.functional.linear(x.float(), weight.dequantized(), rounded)
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    if y.numel():
        assert (y.float() - want).abs().max() <= TOLERANCE[x.dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_product_agrees_with_decoded_weights(by_rounding: ByRounding, dtype: torch.dtype, bits: int, rows: int) -> None:
    weight = by_rounding(torch.randn(72, 128), bits=bits)
    check(weight, torch.randn(rows, 128, dtype=dtype), torch.randn(72))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rounds", [0, 1, 8, 16])
@pytest.mark.parametrize("compiled", [True, False])
def test_any_number_of_rounds_with_and_without_compiled_rotation(
    by_rounding: ByRounding, dtype: torch.dtype, rounds: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: native.Native({}, "for this test"))
    weight = by_rounding(torch.randn(64, 64), rounds=rounds)
    check(weight, torch.randn(5, 64, dtype=dtype))
    check(weight, torch.randn(1, 64, dtype=dtype))


@pytest.mark.parametrize("shape", [(24, 100), (13, 64), (5, 33), (130, 40)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [2, 300])
def test_shapes_that_fill_no_group_or_word(
    by_rounding: ByRounding, shape: tuple[int, int], dtype: torch.dtype, rows: int
) -> None:
    check(by_rounding(torch.randn(*shape)), torch.randn(rows, shape[1], dtype=dtype), torch.randn(shape[0]))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sizes(by_rounding: ByRounding, group_size: int) -> None:
    check(by_rounding(torch.randn(64, 256), group_size=group_size), torch.randn(2, 256).bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_batch_shape_layout_and_no_rows(by_rounding: ByRounding, dtype: torch.dtype) -> None:
    weight = by_rounding(torch.randn(40, 64))
    for x in (
        torch.randn(64),
        torch.randn(2, 3, 4, 64),
        torch.randn(64, 7).t(),
        torch.randn(4, 128)[:, ::2],
        torch.randn(1, 5, 64).transpose(0, 1),
        torch.empty(0, 64),
        torch.empty(2, 0, 64),
    ):
        check(weight, x.to(dtype) if x.is_contiguous() else x.to(dtype, memory_format=torch.preserve_format))


def test_buffers_are_the_tensors_of_a_checkpoint(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(24, 64))
    want = {name.removeprefix("p."): tensor for name, tensor in to_tensors("p", weight).items()}
    module = RotatedLinear.from_weight(weight, None, torch.bfloat16)
    empty = RotatedLinear(64, 24, False, bits=4, group_size=32, rounds=4, dtype=torch.bfloat16)
    assert headers_of(module.state_dict()) == headers_of(empty.state_dict()) == headers_of(want)
    again = module.quantized_weight()
    assert all(torch.equal(getattr(again, name), getattr(weight, name)) for name in ("codes", "points", "steps"))


def test_new_weights_are_used_after_loading(by_rounding: ByRounding) -> None:
    old, new = (RotatedLinear.from_weight(by_rounding(torch.randn(8, 32)), None, torch.float32) for _ in range(2))
    x = torch.randn(1, 32)
    assert not torch.allclose(old(x), new(x))
    old.load_state_dict(new.state_dict())
    assert torch.equal(old(x), new(x))


def test_half_keeps_the_tensors_of_the_format(by_rounding: ByRounding) -> None:
    module = RotatedLinear.from_weight(by_rounding(torch.randn(8, 32)), torch.randn(8), torch.float32)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module.bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())
    assert headers_of(dict(module.named_buffers())) == headers_of(before)
    assert module.dtype == torch.bfloat16
    assert module(torch.randn(1, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(by_rounding: ByRounding, duplicate: Callable[[RotatedLinear], RotatedLinear]) -> None:
    module = RotatedLinear.from_weight(by_rounding(torch.randn(8, 32)), None, torch.bfloat16)
    x = torch.randn(2, 32).bfloat16()
    y = module(x)
    assert torch.equal(duplicate(module)(x), y)


def test_gradient_of_the_input_is_that_of_the_decoded_weights(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(24, 50))
    module = RotatedLinear.from_weight(weight, None, torch.float32)
    x = torch.randn(3, 50, requires_grad=True)
    module(x).square().sum().backward()
    y = x.detach() @ weight.dequantized().t()
    torch.testing.assert_close(x.grad, 2 * y @ weight.dequantized(), rtol=1e-4, atol=1e-4)


def test_inference_mode(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(24, 64))
    with torch.inference_mode():
        check(weight, torch.randn(2, 64).bfloat16())


def test_a_wrong_width_says_what_is_expected(by_rounding: ByRounding) -> None:
    module = RotatedLinear.from_weight(by_rounding(torch.randn(8, 32)), None, torch.float32)
    with pytest.raises(ValueError, match="got an input of 16 channels, expected 32"):
        module(torch.randn(4, 16))


def test_impossible_values_are_refused(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(8, 32))
    weight.steps[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        RotatedLinear.from_weight(weight, None, torch.float32)
