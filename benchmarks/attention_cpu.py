"""Causal attention on a CPU: SDPA's fused kernel against plain matrix products, forward and backward.

`attention: auto` takes plain products in bf16 for rows of up to EAGER_LIMIT tokens; this is where that limit is from.

    python benchmarks/attention_cpu.py [--rounds 12]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from luthier.core.stats import bootstrap_median

TOKENS, HEADS, HEAD_DIM = 2048, 4, 64  # tokens in a batch stay the same, rows get longer


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * HEAD_DIM**-0.5 + mask
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def seconds(attention: Callable[..., Tensor], length: int, dtype: torch.dtype) -> float:
    """One forward and backward pass."""
    shape = (TOKENS // length, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    start = time.perf_counter()
    attention(q, k, v, mask).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    for dtype in (torch.bfloat16, torch.float32):
        for length in (128, 256, 512, 1024):
            for attention in (sdpa, products):
                seconds(attention, length, dtype)
            pairs = [(seconds(sdpa, length, dtype), seconds(products, length, dtype)) for _ in range(rounds)]
            ratio = bootstrap_median([fused / plain for fused, plain in pairs])
            record(
                "attention_cpu",
                dtype=str(dtype).removeprefix("torch."),
                length=length,
                rounds=rounds,
                sdpa_ms=round(1e3 * bootstrap_median([fused for fused, _ in pairs]).value, 2),
                products_ms=round(1e3 * bootstrap_median([plain for _, plain in pairs]).value, 2),
                sdpa_over_products=ratio.text(2),
            )


if __name__ == "__main__":
    main()
