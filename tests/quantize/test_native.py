"""The rotation in C against its definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from luthier.quantize.kernels import native
from luthier.quantize.pairs import random_pairs
from luthier.quantize.rotation import rotate
from luthier.quantize.weights import QuantizedWeight

needs_compiler = pytest.mark.skipif(not native.load().functions, reason=native.load().reason)


def make(channels: int, group_size: int, rounds: int) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(0)
    groups = channels // group_size
    return QuantizedWeight(
        codes=torch.zeros(4, channels, dtype=torch.uint8),
        points=torch.zeros(4, groups, dtype=torch.uint8),
        steps=torch.ones(4, groups).half(),
        theta=(0.5 * torch.randn(rounds, channels // 2, generator=draw)).half(),
        pairs=torch.from_numpy(random_pairs(channels, group_size=group_size, rounds=rounds, seed=0)[0]),
        channel_scales=(torch.rand(channels, generator=draw) + 0.5).half(),
        bits=4,
        group_size=group_size,
        in_features=channels,
    )


@needs_compiler
@pytest.mark.parametrize(("channels", "group_size", "rounds"), [(256, 128, 8), (192, 64, 3), (96, 32, 16), (64, 32, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_rotation(channels: int, group_size: int, rounds: int, dtype: torch.dtype) -> None:
    weight = make(channels, group_size, rounds)
    x = torch.randn(5, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = rotate(x.float() * weight.channel_scales, weight.pairs, weight.theta.float(), group_size=group_size)
    found = native.rotate(x, native.Tables.of(weight))
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@needs_compiler
def test_values_that_are_not_numbers_stay_so() -> None:
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 3] = float("nan")
    assert bool(torch.isnan(native.rotate(x, native.Tables.of(make(64, 32, 2)))).any())


@pytest.mark.parametrize(
    ("setting", "reason"), [("LUTHIER_NATIVE=0", "turned off"), ("CC=/no/such/cc", "compiler failed")]
)
def test_without_it_the_reason_is_told(setting: str, reason: str, tmp_path: object) -> None:
    name, _, value = setting.partition("=")
    code = "from luthier.quantize.kernels import native; print(native.load().functions, native.load().reason)"
    environment = {name: value, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("{} ")
    assert reason in done.stdout
