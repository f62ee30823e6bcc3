"""The quantizer: its grid, its straight-through gradients, and codes that mean what fake quantization computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.quantize.affine import SMALLEST_RANGE, decode, encode, fake_quantize, grid


@settings(max_examples=30, deadline=None)
@example(8, 213, 1e-3)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 50.0]))
def test_codes_decode_to_what_training_saw(bits: int, seed: int, size: float) -> None:
    weight = size * torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(seed))
    step, zero = grid(weight, bits)
    codes, points = encode(weight, step, zero, bits)
    assert int(codes.max()) <= 2**bits - 1
    stored = step.clamp(min=SMALLEST_RANGE)  # as files hold it
    torch.testing.assert_close(
        decode(codes, points, stored), fake_quantize(weight, step, zero, bits), rtol=0, atol=1e-5 * size
    )


def test_rounding_error_is_at_most_one_step() -> None:
    weight = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0))
    step, zero = grid(weight, 4)
    error = (fake_quantize(weight, step, zero, 4) - weight).abs()
    assert bool((error <= step * 1.0001).all())
    assert float((error / step).mean()) == pytest.approx(0.25, abs=0.03)


def test_a_constant_group_has_a_finite_grid() -> None:
    for value in (0.0, 0.7, -0.7):
        step, zero = grid(torch.full((1, 1, 32), value), 4)
        assert bool(torch.isfinite(step).all() and torch.isfinite(zero).all())
        assert bool((step > 0).all())


def test_gradients_pass_straight_through_even_where_values_clip() -> None:
    weight = torch.tensor([[[0.0, 0.4, 1.0, 9.0]]], requires_grad=True)  # 9 lies far outside the grid
    step, zero = torch.full((1, 1, 1), 0.1, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    fake_quantize(weight, step, zero, 4).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))
    assert step.grad is not None
    assert float(zero.grad.abs()) < 1e-6  # type: ignore[union-attr]


def test_stage_one_gradient_flows_through_the_range() -> None:
    """Only the extremes of a group move its grid, and they feel what that does to all others."""
    weight = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (through,) = torch.autograd.grad((fake_quantize(weight, *grid(weight, 2), 2) ** 2).sum(), weight)
    step, zero = grid(weight.detach(), 2)
    (fixed,) = torch.autograd.grad((fake_quantize(weight, step, zero, 2) ** 2).sum(), weight)
    extreme = (weight == weight.amax(-1, keepdim=True)) | (weight == weight.amin(-1, keepdim=True))
    assert bool(((through - fixed).abs() > 1e-3)[extreme].all())
    torch.testing.assert_close(through[~extreme], fixed[~extreme])
