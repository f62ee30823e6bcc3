"""The rotation: golden values, its inverse, its matrix form, and exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.quantize.gradient import reference_rotate
from luthier.quantize.pairs import random_pairs
from luthier.quantize.rotation import apply_blocks, block_matrices, rotate


def make(channels: int, group_size: int, rounds: int, *, std: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    pairs, _ = random_pairs(channels, group_size=group_size, rounds=rounds, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    theta = std * torch.randn(rounds, channels // 2, dtype=torch.float64, generator=noise)
    return torch.from_numpy(pairs), theta


def test_golden_vector() -> None:
    pairs, _ = make(128, 128, 8)
    theta = (torch.arange(512, dtype=torch.float64) / 512 - 0.5).view(8, 64)
    x = torch.arange(128, dtype=torch.float64) / 128
    y = rotate(x, pairs, theta, group_size=128)
    golden = [-0.46046761201652164, 0.35613078350329913, -0.48668525270330576, -0.1140034271038326]
    assert y[:4].tolist() == pytest.approx(golden, abs=1e-14)
    assert float(y[127]) == pytest.approx(0.8172134395761583, abs=1e-14)
    assert float(y.sum()) == pytest.approx(47.78296103707892, abs=1e-12)
    assert float(y.norm()) == pytest.approx(6.493686837998888, abs=1e-13)


def test_the_sign_of_a_quarter_turn() -> None:
    x = torch.zeros(32, dtype=torch.float64)
    x[0], x[1] = 1, 2
    pairs = torch.arange(32, dtype=torch.int16)[None]
    theta = torch.zeros(1, 16, dtype=torch.float64)
    theta[0, 0] = torch.pi / 2
    assert rotate(x, pairs, theta, group_size=32)[:2].tolist() == pytest.approx([2, -1])


@pytest.mark.parametrize(("channels", "group_size", "rounds"), [(128, 128, 8), (192, 64, 3), (96, 32, 16), (64, 32, 0)])
def test_inverse_matrices_and_length(channels: int, group_size: int, rounds: int) -> None:
    pairs, theta = make(channels, group_size, rounds)
    x = torch.randn(5, channels, dtype=torch.float64)
    y = rotate(x, pairs, theta, group_size=group_size)
    back = rotate(y, pairs, theta, group_size=group_size, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    matrices = block_matrices(pairs, theta, group_size=group_size)
    torch.testing.assert_close(apply_blocks(x, matrices), y)
    torch.testing.assert_close(apply_blocks(y, matrices.transpose(1, 2)), x)


def test_groups_do_not_mix() -> None:
    pairs, theta = make(128, 32, 8)
    x = torch.zeros(128, dtype=torch.float64)
    x[32:64] = 1
    y = rotate(x, pairs, theta, group_size=32)
    assert not y[:32].any()
    assert not y[64:].any()


def test_scaled_rotation_of_both_sides_preserves_the_product() -> None:
    pairs, theta = make(64, 32, 8)
    x, weight = torch.randn(3, 64, dtype=torch.float64), torch.randn(7, 64, dtype=torch.float64)
    alpha = torch.rand(64, dtype=torch.float64) + 0.5
    product = rotate(x / alpha, pairs, theta, group_size=32) @ rotate(weight * alpha, pairs, theta, group_size=32).T
    torch.testing.assert_close(product, x @ weight.T)


@pytest.mark.parametrize("std", [0.0, 0.5, 1.5])
def test_exact_gradients(std: float) -> None:
    """Autograd of both forms against finite differences."""
    pairs, theta = make(32, 32, 3, std=std)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    theta.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: rotate(a, pairs, b, group_size=32), (x, theta))
    blocks = lambda a, b: apply_blocks(a, block_matrices(pairs, b, group_size=32))  # noqa: E731
    assert torch.autograd.gradcheck(blocks, (x, theta))


@pytest.mark.parametrize(
    ("std", "low", "high"), [(0.0, 0.0, 1e-12), (0.1, 0.05, 0.2), (0.8, 0.6, 1.0), (1.5, 0.9, 1.4)]
)
def test_the_published_gradient_is_wrong_away_from_zero(std: float, low: float, high: float) -> None:
    """Relative errors of the angles' gradient as measured on the published code; the input's gradient is exact."""
    pairs, theta = make(256, 128, 8, std=std)
    x, upstream = torch.randn(2, 16, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for reference in (False, True):
        a, b = x.clone().requires_grad_(True), theta.clone().requires_grad_(True)
        y = reference_rotate(a, pairs, b, 128) if reference else rotate(a, pairs, b, group_size=128)
        found.append(torch.autograd.grad(y, (a, b), upstream))
    (exact_x, exact), (other_x, other) = found
    torch.testing.assert_close(exact_x, other_x)
    assert low <= float((other - exact).norm() / exact.norm()) <= high
