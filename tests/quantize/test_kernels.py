"""Which kernel is chosen, and each kernel alone against the decoded matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.cli import env
from luthier.core.console import Console
from luthier.quantize.kernels import native
from luthier.quantize.kernels.cpu import Blocks, Compiled, Int4, Stored, dequantize
from luthier.quantize.kernels.dispatch import Runner, choose, summary
from luthier.quantize.linear import RotatedLinear
from luthier.quantize.rotation import rotate
from luthier.quantize.weights import QuantizedWeight

ByRounding = Callable[..., QuantizedWeight]


def stored(weight: QuantizedWeight) -> Stored:
    return RotatedLinear.from_weight(weight, None, torch.bfloat16).stored()


@pytest.mark.parametrize(
    ("device", "dtype", "bits", "group_size", "few", "many"),
    [
        ("cpu", torch.bfloat16, 4, 128, "int4", "dequantize"),
        ("cpu", torch.bfloat16, 2, 32, "int4", "dequantize"),
        ("cpu", torch.bfloat16, 4, 48, "dense", "dense"),
        ("cpu", torch.bfloat16, 8, 128, "dense", "dense"),
        ("cpu", torch.float32, 4, 128, "dense", "dense"),
        ("cpu", torch.float16, 4, 128, "dense", "dense"),
        ("cuda", torch.float16, 8, 48, "dequantize", "dequantize"),
    ],
)
def test_table(device: str, dtype: torch.dtype, bits: int, group_size: int, few: str, many: str) -> None:
    choice = choose(device, dtype, bits, group_size)
    assert (choice.few, choice.many) == (few, many)
    assert choice.reason


def test_a_case_without_a_kernel_is_named() -> None:
    with pytest.raises(ValueError, match=r"no kernel for 4 bits in torch\.float64 on cpu"):
        choose("cpu", torch.float64, 4, 128)


def test_rows_decide_between_few_and_many(by_rounding: ByRounding, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = by_rounding(torch.randn(16, 64))
    runner = Runner([weight], [stored(weight)], torch.bfloat16)
    called = []
    monkeypatch.setattr(runner, "few", lambda x: called.append("few"))
    monkeypatch.setattr(runner, "many", lambda x: called.append("many"))
    for rows in (1, runner.choice.limit, runner.choice.limit + 1):
        runner(torch.randn(rows, 64).bfloat16())
    assert called == ["few", "few", "many"]


@pytest.mark.parametrize("kernel", [Blocks, Compiled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_rotations_agree_with_the_definition(
    by_rounding: ByRounding, kernel: type[Blocks | Compiled], dtype: torch.dtype, rows: int
) -> None:
    if kernel is Compiled and not native.load().functions:
        pytest.skip(native.load().reason)
    weight = by_rounding(torch.randn(8, 96), rounds=8)
    x = torch.randn(rows, 96, dtype=dtype)
    want = rotate(x.float() * weight.channel_scales.float(), weight.pairs, weight.theta.float(), group_size=32)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(kernel(weight)(x), want.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_is_exact(by_rounding: ByRounding, bits: int) -> None:
    weight = by_rounding(torch.randn(21, 96), bits=bits)
    assert torch.equal(dequantize(stored(weight), torch.float32), weight.rotated().t())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_decodes_within_the_rounding_of_bf16(by_rounding: ByRounding, bits: int) -> None:
    first, second = (by_rounding(torch.randn(rows, 64), bits=bits) for rows in (70, 13))
    y = Int4([stored(first), stored(second)])(torch.eye(64).bfloat16()).float()
    want = torch.cat([first.rotated(), second.rotated()]).t()
    step = torch.cat([first.steps, second.steps]).float().repeat_interleave(32, 1).t()
    assert ((y - want).abs() <= step * 2 ** (bits - 8) + 2**-8 * want.abs()).all()


def test_nothing_to_rotate_is_skipped(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(16, 64), rounds=0)
    scaled = Runner([weight], [stored(weight)], torch.bfloat16)
    weight.channel_scales.fill_(1)
    plain = Runner([weight], [stored(weight)], torch.bfloat16)
    assert plain.rotation is None
    assert scaled.rotation is not None


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, by_rounding: ByRounding) -> None:
    monkeypatch.setenv("LUTHIER_NATIVE", "0")
    native.load.cache_clear()
    try:
        weight = by_rounding(torch.randn(16, 64))
        assert (
            "slower (turned off by LUTHIER_NATIVE=0)"
            in Runner([weight], [stored(weight)], torch.bfloat16).rotation_name
        )
        assert "LUTHIER_NATIVE=0" in summary("cpu")
    finally:
        native.load.cache_clear()


@pytest.mark.parametrize("triton", [True, False])
def test_summary_names_the_kernels_and_why(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.quantize.kernels.gpu.available", lambda: triton)
    for device, first in (("cpu", "int4 up to 256 rows"), ("cuda", "triton" if triton else "dequantize")):
        said = summary(device)
        assert said.startswith(f"{device} bf16: {first}")
        assert choose(device, torch.bfloat16, 4, 128).reason in said


@pytest.mark.parametrize("devices", [[], ["a GPU"]])
def test_env_names_them_for_every_device(devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "snapshot", lambda: {"torch_threads": 1, "devices": devices})
    results: list[dict[str, Any]] = []
    monkeypatch.setattr(Console, "result", lambda self, found: results.append(found))
    env.run(env.EnvConfig(), Console())
    assert [line.split(" bf16: ")[0] for line in results[0]["int4_kernels"]] == ["cpu", "cuda"][: 1 + len(devices)]
