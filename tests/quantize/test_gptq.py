"""GPTQ against the definition, column by column in fp64, and what it must do in easy cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.quantize.affine import decode, encode, grid
from luthier.quantize.gptq import DAMPING, gptq, rotated_hessian
from luthier.quantize.pairs import random_pairs
from luthier.quantize.rotation import block_matrices


def problem(rows: int = 6, channels: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(400, channels, generator=draw) @ torch.randn(channels, channels, generator=draw) / 8
    return torch.randn(rows, channels, generator=draw), x, x.T @ x


def decoded(codes: Tensor, points: Tensor, step: Tensor, size: int) -> Tensor:
    return decode(codes.view(len(codes), -1, size), points[..., None], step[..., None]).flatten(1)


def by_definition(weight: Tensor, hessian: Tensor, bits: int, size: int) -> Tensor:
    """Optimal brain quantization in a fixed order: invert the moments of what is left again for every column."""
    step, zero = grid(weight.view(len(weight), -1, size), bits)
    points = (-zero.round()).clamp(0, 2**bits - 1)
    left, codes = weight.double(), torch.empty_like(weight)
    moments = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    for column in range(weight.shape[1]):
        s, p = step[:, column // size, 0].double(), points[:, column // size, 0]
        codes[:, column] = ((left[:, column] / s).round() + p).clamp(0, 2**bits - 1)
        inverse = torch.linalg.inv(moments[column:, column:])
        error = left[:, column] - (codes[:, column] - p) * s
        left[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


@pytest.mark.parametrize(("channels", "bits"), [(64, 4), (160, 3), (320, 2)])
def test_it_is_its_definition(channels: int, bits: int) -> None:
    weight, _, hessian = problem(channels=channels)
    codes, _, _ = gptq(weight, hessian, bits=bits, group_size=32)
    assert float((codes.float() == by_definition(weight, hessian, bits, 32)).float().mean()) > 0.999


def test_independent_inputs_mean_rounding_to_nearest() -> None:
    weight, _, _ = problem()
    codes, points, _ = gptq(weight, torch.eye(64) * 7, bits=4, group_size=32)
    wanted, wanted_points = encode(weight.view(6, 2, 32), *grid(weight.view(6, 2, 32), 4), 4)
    assert torch.equal(codes, wanted.flatten(1))
    assert torch.equal(points, wanted_points[..., 0])


def test_correlated_inputs_lose_less_than_by_rounding() -> None:
    weight, x, hessian = problem()
    codes, points, step = gptq(weight, hessian, bits=3, group_size=32)
    near, near_points = encode(weight.view(6, 2, 32), *grid(weight.view(6, 2, 32), 3), 3)
    loss = [
        float((x @ (decoded(c, p, step, 32) - weight).T).square().sum())
        for c, p in ((codes, points), (near.flatten(1), near_points[..., 0]))
    ]
    assert loss[0] < 0.6 * loss[1]


def test_dead_and_dependent_channels_do_no_harm() -> None:
    weight, x, _ = problem()
    x[:, 5], x[:, 9] = 0, x[:, 8]
    codes, points, step = gptq(weight, x.T @ x, bits=4, group_size=32)
    assert bool(((decoded(codes, points, step, 32) - weight).abs() < 3 * step.amax()).all())
    gptq(weight, torch.zeros(64, 64), bits=4, group_size=32)


def test_moments_that_are_not_finite_are_refused() -> None:
    weight, _, hessian = problem()
    hessian[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="not positive definite"):
        gptq(weight, hessian, bits=4, group_size=32)


def test_rotated_moments_are_those_of_the_rotated_input() -> None:
    _, x, hessian = problem()
    pairs, _ = random_pairs(64, group_size=32, rounds=3, seed=0)
    theta = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    blocks = block_matrices(torch.from_numpy(pairs), theta, group_size=32) / 1.5
    turned = x @ torch.block_diag(*blocks)
    torch.testing.assert_close(rotated_hessian(hessian, blocks), turned.T @ turned, rtol=1e-4, atol=1e-2)
