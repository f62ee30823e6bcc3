"""Rotation and quantized linear layers on a CUDA device; it says so and stops where there is none.

Rotation: Triton by rounds and by dense blocks, torch's block product, and a plain copy of x as the floor. Linear
layers: ours (rotation and product; one row in one launch; the product alone), torch's int4 product (bf16 scales, no
rotation) and bf16. Every time is the median of calls replayed from a CUDA graph, with the L2 cache cleared before each,
in microseconds.

    python benchmarks/rotation_gpu.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from record import record
from torch import Tensor

from luthier.quantize.kernels import gpu
from luthier.quantize.pairs import round_robin_pairs
from luthier.quantize.rotation import apply_blocks
from luthier.quantize.weights import QuantizedWeight

GROUP, ROUNDS = 128, 8
SHAPES = ((1024, 4096), (4096, 1024), (4096, 4096), (4096, 12288), (12288, 4096))  # (in, out)
ROWS = (1, 4, 16, 64, 512, 4096)


def random_weight(in_features: int, out: int) -> QuantizedWeight:
    """Random 4-bit codes and angles; speed needs no others."""
    groups = in_features // GROUP
    pairs, _ = round_robin_pairs(in_features, group_size=GROUP, rounds=ROUNDS, seed=0)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (out, in_features), dtype=torch.uint8),
        points=torch.randint(0, 16, (out, groups), dtype=torch.uint8),
        steps=(torch.rand(out, groups) * 0.01 + 0.001).half(),
        theta=(torch.randn(ROUNDS, in_features // 2) * 0.3).half(),
        pairs=torch.from_numpy(pairs),
        channel_scales=torch.ones(in_features).half(),
        bits=4,
        group_size=GROUP,
        in_features=in_features,
    )


def microseconds(call: Callable[[], object], calls: int = 30) -> float:
    """Median time of a call in a CUDA graph, with a cold L2 cache."""
    filler = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(calls):
        filler.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return round(statistics.median(times), 2)


def rotations(x: Tensor, weight: QuantizedWeight, packed: gpu.GpuWeight) -> dict[str, float]:
    """Every form of the rotation, and a copy."""
    from luthier.quantize.kernels.triton_rotate import by_blocks, by_rounds

    tables = (packed.partner, packed.cos, packed.sin, packed.channel_scales, GROUP)
    blocks, target = weight.transform_blocks().cuda().to(x.dtype), torch.empty_like(x)
    norm = torch.ones(x.shape[1], dtype=x.dtype, device="cuda")
    return {
        "copy": microseconds(lambda: target.copy_(x)),
        "rounds": microseconds(lambda: by_rounds(x, *tables)),
        "blocks": microseconds(lambda: by_blocks(x, *tables)),
        "torch blocks": microseconds(lambda: apply_blocks(x, blocks)),
        "norm + rotation": microseconds(lambda: gpu.rms_norm_rotate(x, norm, 1e-6, packed)),
        "torch norm": microseconds(lambda: torch.nn.functional.rms_norm(x, norm.shape, norm, 1e-6)),
    }


def linears(x: Tensor, weight: QuantizedWeight, packed: gpu.GpuWeight) -> dict[str, float]:
    """Whole linear layers."""
    dense = torch.randn(weight.codes.shape, dtype=x.dtype, device="cuda")
    codes = weight.codes.cuda()
    tiny = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    steps = weight.steps.cuda().float()
    grid = torch.stack([steps, (8 - weight.points.cuda().float()) * steps], -1).transpose(0, 1).bfloat16().contiguous()
    times = {"ours, one launch": microseconds(lambda: gpu.linear_at_once(x, packed))} if len(x) == 1 else {}
    return times | {
        "ours": microseconds(lambda: gpu.linear(x, packed)),
        "ours, product only": microseconds(lambda: gpu.multiply(x, packed)),
        "tinygemm": microseconds(lambda: torch.ops.aten._weight_int4pack_mm(x, tiny, GROUP, grid)),
        "bf16": microseconds(lambda: x @ dense.t()),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available() or not gpu.available():
        print("rotation_gpu: skipped, it needs a CUDA device and Triton", file=sys.stderr)
        return
    torch.manual_seed(0)
    for in_features, out in SHAPES:
        weight = random_weight(in_features, out)
        packed = gpu.prepare(weight, "cuda")
        for rows in ROWS:
            x = torch.randn(rows, in_features, dtype=torch.bfloat16, device="cuda")
            record(
                "rotation_gpu",
                device=torch.cuda.get_device_name(),
                shape=[rows, in_features, out],
                rotation_us=rotations(x, weight, packed),
                linear_us=linears(x, weight, packed),
            )


if __name__ == "__main__":
    main()
