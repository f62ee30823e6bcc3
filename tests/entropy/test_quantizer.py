"""Codes are whole numbers in range, the decoder sees nothing finer, and gradients pass straight through."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.entropy.config import FSQ_LEVELS, EemConfig
from luthier.entropy.quantizer import (
    fsq_code,
    fsq_straight_through,
    fsq_values,
    noise_code,
    noise_values,
    replace_by_null,
    with_noise,
)


def numbers(rows: int = 500, dims: int = 3) -> Tensor:
    return 3 * torch.randn(rows, dims, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", FSQ_LEVELS)
def test_fsq_uses_every_level_and_no_other(levels: int) -> None:
    code = fsq_code(numbers(), levels)
    assert code.dtype == torch.int64
    assert sorted(code.unique().tolist()) == list(range(levels))
    values = fsq_values(torch.arange(levels), levels)
    torch.testing.assert_close(values, torch.linspace(-1, 1, levels))


@pytest.mark.parametrize("levels", FSQ_LEVELS)
def test_fsq_takes_the_nearest_level(levels: int) -> None:
    bound = torch.tanh(numbers())
    distance = (bound[..., None] - torch.linspace(-1, 1, levels)).abs()
    torch.testing.assert_close(
        (bound - fsq_values(fsq_code(numbers(), levels), levels)).abs(), distance.amin(-1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("levels", FSQ_LEVELS)
def test_training_shows_the_decoder_exactly_what_a_code_shows_it(levels: int) -> None:
    x = numbers().requires_grad_()
    values = fsq_straight_through(x, levels)
    assert torch.equal(values, fsq_values(fsq_code(x, levels), levels))
    (gradient,) = torch.autograd.grad(values.sum(), x)
    torch.testing.assert_close(gradient, 1 - torch.tanh(x.detach()) ** 2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.sampled_from(FSQ_LEVELS))
def test_a_code_survives_its_own_values(row: list[float], levels: int) -> None:
    """Reading a transmitted code and coding its values again gives the same code."""
    code = fsq_code(torch.tensor([row]), levels)
    again = torch.atanh(fsq_values(code, levels).clamp(-1 + 1e-6, 1 - 1e-6))
    assert torch.equal(fsq_code(again, levels), code)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.integers(2, 256))
def test_a_noise_code_is_in_range(row: list[float], levels: int) -> None:
    code = noise_code(torch.tensor([row]), levels, 0.125)
    assert int(code.min()) >= 0
    assert int(code.max()) < levels
    assert torch.equal(noise_code(noise_values(code, levels, 0.125), levels, 0.125), code)


def test_rounding_lies_inside_the_noise() -> None:
    """In use the decoder sees a value that the noise could have shown it in training."""
    x, width = numbers(), 0.125
    shift = noise_values(noise_code(x, 256, width), 256, width) - x
    assert float(shift.min()) >= 0
    assert float(shift.max()) < width
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    noise = with_noise(x, uniform, width) - x
    assert float(noise.min()) >= -1e-6
    assert abs(float(noise.mean() - shift.mean())) < 0.01


def test_null_replaces_whole_codes() -> None:
    values, null = torch.ones(3, 2), torch.tensor([5.0, 6.0])
    replaced = torch.tensor([True, False, True])
    assert replace_by_null(values, null, replaced).tolist() == [[5, 6], [1, 1], [5, 6]]


def test_the_published_codes_cost_what_was_published() -> None:
    """64 numbers over 1024 tokens: 0.173 nats per token at 4 bits, 0.347 at 8."""
    four, eight = (
        EemConfig(vocab_size=8000, dims=64, levels=levels, quantizer="noise").code_bits for levels in (16, 256)
    )
    assert four * math.log(2) / 1024 == pytest.approx(0.17329, abs=1e-5)
    assert eight * math.log(2) / 1024 == pytest.approx(0.34657, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"levels": 7}, "levels: got 7, expected one of 2, 3, 4, 5, 8, 16"),
        ({"quantizer": "noise", "levels": 300}, "levels and noise_width: got 300"),
        ({"quantizer": "noise", "noise_width": 0.0}, "levels and noise_width"),
        ({"dims": 0}, "dims: got 0"),
        ({"intro": "embedding", "dims": 128}, "leaves nothing of a decoder width of 128"),
        ({"half": "mixer", "padding_side": "left"}, "a mixer sees padding on the left"),
        ({"kernel": 4}, "kernel: got 4, but a transformer has none"),
        ({"heads": 3}, "3 heads do not fit a width of 64"),
        ({"heads": 64}, "64 heads do not fit a width of 64"),
    ],
)
def test_an_impossible_architecture_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EemConfig(vocab_size=16, **changes)
