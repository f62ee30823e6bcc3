"""What the GPU kernels must compute, on `cpu` in Triton's interpreter or on `cuda`: prints JSON {check: error or null}.

TRITON_INTERPRET=1 python tests/quantize/gpu_checks.py cpu
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from luthier.quantize.kernels import gpu
from luthier.quantize.pairs import random_pairs
from luthier.quantize.rotation import rotate
from luthier.quantize.weights import QuantizedWeight, padded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value. Triton's interpreter rounds to bf16 towards zero, a GPU to the nearest.
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-8 if "cuda" in sys.argv else 2**-7, torch.float16: 2**-11}


def make(out: int, in_features: int, group_size: int, rounds: int, *, bits: int = 4, seed: int = 0) -> QuantizedWeight:
    """A random quantized matrix."""
    draw = torch.Generator().manual_seed(seed)
    channels = padded(in_features, group_size)
    groups = channels // group_size
    pairs, _ = random_pairs(channels, group_size=group_size, rounds=max(1, rounds), seed=seed)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (out, channels), dtype=torch.uint8, generator=draw),
        points=torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, generator=draw),
        steps=(torch.rand(out, groups, generator=draw) * 0.02 + 0.01).half(),
        theta=torch.randn(rounds, channels // 2, generator=draw).half(),
        pairs=torch.from_numpy(pairs)[:rounds],
        channel_scales=(torch.rand(channels, generator=draw) + 0.5).half(),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


def transformed(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The oracle: rotate(x · channel_scales), fp32."""
    x = pad(x.float().cpu(), (0, weight.codes.shape[1] - x.shape[1])) * weight.channel_scales.float()
    return rotate(x, weight.pairs, weight.theta.float(), group_size=weight.group_size)


def draw(rows: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def same(found: Tensor, expected: Tensor, close: float | None = None, what: object = "") -> None:
    """The largest difference is at most `close` of the largest value; by default what rounding in the dtype allows."""
    assert found.shape == expected.shape, (found.shape, expected.shape, what)
    worst = float((found.float().cpu() - expected).abs().max() / expected.abs().max())
    limit = CLOSE[found.dtype] if close is None else close
    assert worst <= limit, f"{worst:.2e} > {limit:.2e} {what}"


def check_rotation(device: str) -> None:
    for rounds, size, (rows, dtype) in product((0, 1, 4, 8, 16), (32, 64, 128), zip((1, 3, 17), DTYPES, strict=True)):
        weight = make(2, 2 * size - 5, size, rounds, seed=rounds)
        x = draw(rows, weight.in_features, dtype, device)
        same(gpu.rotate(x, gpu.prepare(weight, device)), transformed(x, weight), what=(rounds, size, rows, dtype))


def check_every_dtype_with_every_number_of_rows(device: str) -> None:
    weight = make(2, 64, 32, 4)
    for dtype, rows in product(DTYPES, (1, 3, 17)):
        x = draw(rows, 64, dtype, device)
        same(gpu.rotate(x, gpu.prepare(weight, device)), transformed(x, weight), what=(dtype, rows))


def check_golden_vector(device: str) -> None:
    """Angles are stored in fp16, so the golden values hold to about 1e-3 and the oracle on the same angles closely."""
    weight = make(1, 128, 128, 8)
    pairs, _ = random_pairs(128, group_size=128, rounds=8, seed=0)
    golden = {
        "theta": ((torch.arange(512, dtype=torch.float64) / 512 - 0.5).view(8, 64)).half(),
        "pairs": torch.from_numpy(pairs),
        "channel_scales": torch.ones(128).half(),
    }
    weight = QuantizedWeight(**{**vars(weight), **golden})
    x = torch.arange(128, device=device)[None] / 128
    y = gpu.rotate(x, gpu.prepare(weight, device)).cpu()[0]
    first = torch.tensor([-0.46046761201652164, 0.35613078350329913, -0.48668525270330576, -0.1140034271038326])
    same(y[:4], first, 1e-3)
    assert abs(float(y.norm()) - 6.493686837998888) < 1e-5
    same(y[None], transformed(x, weight))


def check_rows_of_a_wider_tensor(device: str) -> None:
    weight = make(2, 96, 32, 4)
    wide = draw(5, 200, torch.float32, device)
    for x in (wide[:, 50:146], wide[::2, :96], wide[:, :192:2], wide.t()[:96, :5].t()):
        same(gpu.rotate(x, gpu.prepare(weight, device)), transformed(x, weight))


def check_dense_blocks(device: str) -> None:
    from luthier.quantize.kernels.triton_rotate import by_blocks

    for size, dtype in zip((32, 64, 128), DTYPES, strict=True):
        weight = make(2, 2 * size - 5, size, 4)
        packed = gpu.prepare(weight, device)
        x, norm = draw(70, weight.in_features, dtype, device), draw(1, weight.in_features, dtype, device)[0]
        tables = (packed.partner, packed.cos, packed.sin, packed.channel_scales, size)
        close = None if dtype == torch.bfloat16 else 2e-3  # of TF32
        same(by_blocks(x, *tables), transformed(x, weight), close)
        same(by_blocks(x, *tables, norm, 1e-6), transformed(normalized(x, norm, 1e-6), weight), close)


def normalized(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.float()


def check_norm_and_rotation(device: str) -> None:
    for dtype, rows, channels in zip((*DTYPES, torch.bfloat16), (1, 3, 17, 2), (59, 59, 59, 1100), strict=True):
        weight = make(2, channels, 64, 4)
        x, norm = draw(rows, channels, dtype, device), draw(2, channels, dtype, device)[0]
        found = gpu.rms_norm_rotate(x, norm, 0.5, gpu.prepare(weight, device))
        same(found, transformed(normalized(x, norm, 0.5), weight), what=(dtype, rows, channels))


def check_linear(device: str) -> None:
    """Against the exact product of what the rotation gave, for each kernel, and at all against the exact product."""
    shapes = ((32, 2), (64, 3), (128, 4), (64, 8))
    cases = [(rows, dtype, *shapes[i % 4]) for i, (rows, dtype) in enumerate(product((1, 3, 17), DTYPES))]
    cases += [(rows, torch.float32, *shape) for rows in (1, 2) for shape in shapes]
    for rows, dtype, size, bits in cases:
        weight = make(21, 3 * size - 5, size, 4, bits=bits)
        packed, bias = gpu.prepare(weight, device), draw(1, 21, dtype, device)[0]
        x = draw(rows, weight.in_features, dtype, device)
        turned = gpu.rotate(x, packed)
        exact = turned.float().cpu() @ weight.rotated().t()
        close = None if rows <= gpu.MAX_FEW_ROWS else 2 * CLOSE[dtype]
        same(gpu.multiply(turned, packed), exact, close, (rows, dtype, size, bits))
        same(gpu.multiply(turned, packed, bias), exact + bias.float().cpu(), close, (rows, dtype, size, bits))
        same(
            gpu.linear(x, packed, bias),
            transformed(x, weight) @ weight.rotated().t() + bias.float().cpu(),
            3 * CLOSE[dtype],
        )


def check_linear_at_once(device: str) -> None:
    """Rotation and product in one kernel, for every K, width, group size and dtype, with inputs that fill no group."""
    shapes = ((32, 2, 0), (64, 3, 1), (128, 4, 8), (64, 8, 16), (32, 4, 4))
    for dtype, (size, bits, rounds) in product(DTYPES, shapes):
        weight = make(21, 3 * size - 5, size, rounds, bits=bits)
        packed, bias = gpu.prepare(weight, device), draw(1, 21, dtype, device)[0]
        x, what = draw(1, weight.in_features, dtype, device), (dtype, size, bits, rounds)
        exact = transformed(x, weight) @ weight.rotated().t()
        same(gpu.linear_at_once(x, packed), exact, what=what)
        same(gpu.linear_at_once(x, packed, bias), exact + bias.float().cpu(), what=what)
    wide = draw(2, 2 * weight.in_features, torch.float32, device)[:1, ::2]
    same(gpu.linear_at_once(wide, packed), transformed(wide, weight) @ weight.rotated().t())


def check_decoded_weights(device: str) -> None:
    from luthier.quantize.kernels.triton_product import decoded

    for size, bits in ((32, 2), (64, 3), (128, 4), (128, 8)):
        weight = make(5, 3 * size, size, 0, bits=bits)
        packed = gpu.prepare(weight, device)
        found = decoded(packed.codes, packed.points, packed.steps, bits, size, torch.float32)
        assert torch.equal(found.cpu(), weight.rotated()), (size, bits)


def check_zero_points_are_exact(device: str) -> None:
    """Codes equal to their zero points give exactly nothing, whatever the step; with fp16 and bf16 x too."""
    for rows, dtype in product((1, 3, 17), DTYPES):
        weight = make(9, 128, 64, 0)
        codes = weight.points.repeat_interleave(64, 1)
        steps = torch.full_like(weight.steps, 60000)
        packed = gpu.prepare(QuantizedWeight(**{**vars(weight), "codes": codes, "steps": steps}), device)
        assert not gpu.multiply(draw(rows, 128, dtype, device), packed).any(), (rows, dtype)


def check_many_groups(device: str) -> None:
    """More groups than one program takes at a time, and a number that it does not divide."""
    weight = make(6, 32 * 37, 32, 1)
    for rows in (1, 2):
        x = draw(rows, 32 * 37, torch.float32, device)
        same(gpu.linear(x, gpu.prepare(weight, device)), transformed(x, weight) @ weight.rotated().t())


def check_siblings(device: str) -> None:
    one = make(5, 64, 32, 4)
    other = QuantizedWeight(
        **{**vars(one), **{k: getattr(make(7, 64, 32, 4, seed=1), k) for k in ("codes", "points", "steps")}}
    )
    x = draw(3, 64, torch.float32, device)
    found = gpu.linear(x, gpu.prepare(one, device, [other]))
    same(found, transformed(x, one) @ torch.cat([one.rotated(), other.rotated()]).t())
    for bad in (make(5, 64, 32, 4, seed=1), make(5, 64, 64, 4)):
        try:
            gpu.prepare(one, device, [bad])
        except ValueError as error:
            assert "same transform" in str(error)  # noqa: PT017
        else:
            raise AssertionError("packed matrices of different transforms together")


def check_bad_input(device: str) -> None:
    weight = make(5, 60, 32, 4)
    packed = gpu.prepare(weight, device)
    assert gpu.linear(torch.ones(0, 60, device=device), packed).shape == (0, 5)
    for call in (
        lambda: gpu.rotate(torch.ones(2, 61, device=device), packed),
        lambda: gpu.rotate(torch.ones(60, device=device), packed),
        lambda: gpu.multiply(torch.ones(2, 60, device=device), packed),
        lambda: gpu.linear_at_once(torch.ones(2, 60, device=device), packed),
        lambda: gpu.linear_at_once(torch.ones(1, 61, device=device), packed),
        lambda: gpu.prepare(make(5, 256, 256, 1), device),
    ):
        try:
            call()
        except ValueError as error:
            assert "got" in str(error)  # noqa: PT017
        else:
            raise AssertionError("bad input was accepted")


CHECKS: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def main(device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(device)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    main(sys.argv[1])
