"""Which kernel computes what: one table, read from the top, and the runner that follows it.

Rows are tokens: one while decoding, the length of the prompt before. Nothing here has gradients; modules differentiate
through the slow reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from luthier.quantize.kernels import gpu, native
from luthier.quantize.kernels.cpu import Blocks, Compiled, Dense, Dequantize, Int4, Stored
from luthier.quantize.weights import QuantizedWeight

Kernel = Callable[[Tensor], Tensor]
MAX_INT4_ROWS = 256


class Choice(NamedTuple):
    """Kernels for up to `limit` rows and for more, and why."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    bits: tuple[int, ...]
    few: str
    limit: int
    many: str
    reason: str


WIDTHS = (2, 3, 4, 8)
TABLE = (
    Choice(
        "cpu",
        (torch.bfloat16,),
        (2, 3, 4),
        "int4",
        MAX_INT4_ROWS,
        "dequantize",
        "reads a quarter of the bytes; beyond that many rows decoding the weights once is cheaper",
    ),
    Choice(
        "cpu",
        (torch.bfloat16, torch.float32, torch.float16),
        WIDTHS,
        "dense",
        0,
        "dense",
        "torch has no fast product for this dtype and width, so weights are decoded once and kept in full size",
    ),
    Choice(
        "cuda",
        (torch.bfloat16, torch.float16, torch.float32),
        WIDTHS,
        "triton",
        gpu.MAX_FEW_ROWS,
        "triton",
        "Triton multiplies codes as they are for a few rows, and decodes them for a call with more",
    ),
    Choice(
        "cuda",
        (torch.bfloat16, torch.float16, torch.float32),
        WIDTHS,
        "dequantize",
        0,
        "dequantize",
        "without Triton, or in groups that its kernels do not take, weights are decoded for every call",
    ),
)

POSSIBLE: dict[str, Callable[[int], bool]] = {  # by group size; kernels that are not named always are
    "int4": lambda group_size: group_size in (32, 64, 128, 256),
    "triton": lambda group_size: group_size in (32, 64, 128) and gpu.available(),
}


def choose(device: str, dtype: torch.dtype, bits: int, group_size: int) -> Choice:
    """The first row of the table that fits; ValueError when none does."""
    for choice in TABLE:
        fits = choice.device == device and dtype in choice.dtypes and bits in choice.bits
        possible = POSSIBLE.get(choice.few)
        if fits and (possible is None or possible(group_size)):
            return choice
    raise ValueError(f"no kernel for {bits} bits in {dtype} on {device}")


class Runner:
    """Matrices with one transform and one input, ready to multiply: x (rows, in_features) → (rows, all outputs).

    `weights[i]` and `stored[i]` are the same matrix. Memory: see the kernels; `stored` is referred to, not copied.
    `rotation_of`: a runner with the same transform, whose tables this one takes.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        stored: Sequence[Stored],
        dtype: torch.dtype,
        rotation_of: Runner | None = None,
    ) -> None:
        first, device = weights[0], stored[0].qweight.device.type
        self.choice = choose(device, dtype, first.bits, first.group_size)
        self.filler = first.codes.shape[1] - first.in_features
        if rotation_of is None:
            self.rotation, self.rotation_name = make_rotation(first, self.choice, dtype)
        else:
            self.rotation, self.rotation_name = rotation_of.rotation, rotation_of.rotation_name
        if self.choice.few == "triton":
            packed = gpu.prepare(first, stored[0].qweight.device, weights[1:])
            multiply: Kernel = partial(gpu.multiply, weight=packed)
            self.few = self.many = multiply
            if rotation_of is None and self.rotation is not None:
                self.rotation = partial(gpu.rotate, weight=packed)
        else:
            self.few, self.many = make_products(weights, stored, self.choice, dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """x (rows, in_features) as `multiply` wants it: with whole groups, scaled and rotated."""
        if self.rotation is None:
            return x
        return self.rotation(pad(x, (0, self.filler)) if self.filler else x)

    def multiply(self, x: Tensor) -> Tensor:
        """Rotated rows → (rows, all outputs)."""
        return (self.few if x.shape[0] <= self.choice.limit else self.many)(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(self.rotate(x))


def make_products(
    weights: Sequence[QuantizedWeight], stored: Sequence[Stored], choice: Choice, dtype: torch.dtype
) -> tuple[Kernel, Kernel]:
    """The products for few rows and for many."""
    made: dict[str, Kernel] = {}
    for name in (choice.few, choice.many):
        if name not in made:
            made[name] = PRODUCTS[name](weights, stored, dtype)
    return made[choice.few], made[choice.many]


PRODUCTS: dict[str, Callable[[Sequence[QuantizedWeight], Sequence[Stored], torch.dtype], Kernel]] = {
    "int4": lambda weights, stored, dtype: Int4(stored),
    "dequantize": lambda weights, stored, dtype: Dequantize(stored),
    "dense": lambda weights, stored, dtype: Dense(weights, torch.float32 if dtype == torch.float16 else dtype),
}


def make_rotation(weight: QuantizedWeight, choice: Choice, dtype: torch.dtype) -> tuple[Kernel | None, str]:
    """The rotation, None where there is nothing to do, and its description."""
    if choice.few == "dense":
        return None, "no rotation: folded into the decoded weights"
    if weight.rounds == 0 and bool((weight.channel_scales == 1).all()) and weight.codes.shape[1] == weight.in_features:
        return None, "no rotation: these weights have none"
    if choice.few == "triton":
        return torch.clone, "rotation by Triton"  # the runner puts that in place, from the packed matrix
    if choice.device != "cpu":
        return Blocks(weight), "rotation by dense blocks"
    compiled = native.load()
    if dtype in compiled.functions and weight.group_size <= native.MAX_GROUP:
        return Compiled(weight), f"rotation {compiled.reason}"
    return Blocks(weight), f"rotation by dense blocks, slower ({compiled.reason})"


def summary(device: str) -> str:
    """The kernels for 4 bits in bf16 on a device, and why; compiles the rotation if that was not done before."""
    choice = choose(device, torch.bfloat16, 4, 128)
    rotation = (
        native.load().reason if device == "cpu" else f"by {'Triton' if choice.few == 'triton' else 'dense blocks'}"
    )
    products = (
        choice.many if choice.few == choice.many else f"{choice.few} up to {choice.limit} rows, then {choice.many}"
    )
    return f"{device} bf16: {products} ({choice.reason}); rotation {rotation}"
