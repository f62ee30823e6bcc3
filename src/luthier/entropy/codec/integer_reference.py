"""The integer network in numpy, slow and plain: what every faster version has to equal bit for bit.

B streams advance in lockstep, one byte each. All arithmetic is on int64 arrays whose numbers stay inside 32 bits
between operations. A number with a scale m / 2^32 is multiplied by `rescale`; normalization divides by an integer
square root; softmax and probabilities are powers of two from a cubic polynomial in 12 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.entropy.codec.integer_features import NAMES, History, hashed
from luthier.entropy.codec.integer_weights import GAINS, RESIDUAL_LIMIT, IntegerWeights
from luthier.entropy.codec.segment_code import Code

Ints = NDArray[np.int64]

FRACTION_BITS = 12  # of a bit, in scores and logits
CUBIC = (-10254, 60418, -181236, 1 << 18)  # 2^-x on [0, 1], times 2^18; exact at both ends, off by 1.1e-4 between
SUM_SHIFT = 4  # what is shifted left before it is scaled, so that scales of 2^-32 reach beyond 1/2
SCORE_SHIFT = 6
LOGIT_SHIFT = 8
HIDDEN_LIMIT = 4095
LARGEST_SCALE = (1 << 31) - 1


def rescale(x: Ints, scale: Any) -> Ints:
    """x * scale / 2^32, rounded half up."""
    return (x * scale + (1 << 31)) >> 32


def quotient(gain: int, divisors: Ints) -> Ints:
    """The scale gain / divisor, at most 2^31 - 1; divisors below 1 count as 1."""
    return np.minimum(gain // np.maximum(divisors, 1), LARGEST_SCALE)


def normalize(x: Ints, gain: int, limit: int) -> Ints:
    """The last axis times gain / 2^32 over its Euclidean length, cut at ± limit."""
    squares = (x * x).sum(-1)
    lengths = np.array([math.isqrt(n) for n in squares.ravel().tolist()], np.int64).reshape(squares.shape)
    return np.clip(rescale(x, quotient(gain, lengths)[..., None]), -limit, limit)


def power(below: Ints, *, high: int) -> Ints:
    """2^(high - below / 2^12), rounded down at 0; below is not negative."""
    fraction, halvings = below & 4095, np.minimum(below >> FRACTION_BITS, 31)
    value = np.full_like(below, CUBIC[0])
    for coefficient in CUBIC[1:]:
        value = (value * fraction >> FRACTION_BITS) + coefficient
    value = value << high - 18 if high >= 18 else value >> 18 - high
    return value >> halvings


def probabilities_of(logits: Ints) -> NDArray[np.uint32]:
    """Logits (B, 256) in 2^-12 bits to probabilities (B, 256) in 1 ... 2^23 + 1, of any total below 2^31 + 2^8."""
    return (power(logits.max(-1, keepdims=True) - logits, high=23) + 1).astype(np.uint32)


@dataclass
class ReferenceState:
    """B streams: what was read, keys and values of the last `window` bytes of each layer, and what comes next."""

    history: History
    keys: Ints
    """(layers, B, W, S): the place of a byte is its position modulo W."""
    values: Ints
    position: int
    probabilities: NDArray[np.uint32]
    start: Ints
    """(D): what the residual stream begins with at every byte, in 2^-8."""


def start_of(weights: IntegerWeights, code: Code) -> Ints:
    """(D) a half, so that the sum is rounded, and the rows of a segment code."""
    start = np.full(weights.shape.width, 128, np.int64)
    for dim, level in enumerate(code):
        row = weights.arrays["code"][dim * weights.shape.code_levels + level]
        start += row.astype(np.int64) * int(weights.arrays["code.scale"][0])
    return start


def reference_open(weights: IntegerWeights, streams: int, code: Code = ()) -> ReferenceState:
    """The state of B streams in which nothing was read yet."""
    shape = weights.shape
    ring = np.zeros((shape.layers, streams, shape.window, shape.head_width), np.int64)
    empty = np.zeros((streams, 256), np.uint32)
    return ReferenceState(History.start(streams), ring, ring.copy(), 0, empty, start_of(weights, code))


def reference_step(weights: IntegerWeights, state: ReferenceState, last: NDArray[np.uint8]) -> ReferenceState:
    """Read one byte of each stream (B)."""
    history = state.history.after(last)
    x = _embed(weights, state.start, history, last)
    state = replace(state, history=history)
    for layer in range(weights.shape.layers):
        gains = dict(zip(GAINS, weights.arrays[f"{layer}.gains"].tolist(), strict=True))
        x = _add(x, _attention(weights, state, layer, normalize(x, gains["attention"], 127), gains))
        hidden = _product(weights, f"{layer}.up", normalize(x, gains["feed"], 127))
        hidden = np.clip(hidden, 0, HIDDEN_LIMIT)
        hidden = np.minimum((hidden * hidden + (1 << 15)) >> 16, 255)
        x = _add(x, _product(weights, f"{layer}.down", hidden))
    final = normalize(x, int(weights.arrays["head.gain"][0]), 127)
    logits = _product(weights, "head", final, shift=LOGIT_SHIFT)
    return replace(state, position=state.position + 1, probabilities=probabilities_of(logits))


def _embed(weights: IntegerWeights, start: Ints, history: History, last: NDArray[np.uint8]) -> Ints:
    """The residual stream (B, D) at its beginning."""
    rows = [last.astype(np.intp)]
    rows += [hashed(key, bits) for key, bits in zip(history.keys(), weights.shape.table_bits, strict=True)]
    total = np.tile(start, (len(last), 1))
    for name, row, scale in zip(NAMES, rows, weights.arrays["table.scales"].tolist(), strict=True):
        total += weights.arrays[f"table.{name}"][row].astype(np.int64) * scale
    return total >> 8


def _product(weights: IntegerWeights, name: str, x: Ints, shift: int = SUM_SHIFT) -> Ints:
    """x (B, K) times a matrix (N, K), each output with its scale."""
    sums = x @ weights.arrays[name].astype(np.int64).T
    return rescale(sums << shift, weights.arrays[f"{name}.scale"].astype(np.int64))


def _add(x: Ints, change: Ints) -> Ints:
    return np.clip(x + change, -RESIDUAL_LIMIT, RESIDUAL_LIMIT)


def _attention(weights: IntegerWeights, state: ReferenceState, layer: int, x: Ints, gains: dict[str, int]) -> Ints:
    """Attention of the current byte to the last `window` ones; writes its key and value into the state."""
    shape = weights.shape
    inner, window = shape.heads * shape.head_width, shape.window
    query, key, value = np.split(_product(weights, f"{layer}.qkv", x), [inner, inner + shape.head_width], axis=1)
    query = normalize(query.reshape(len(x), shape.heads, -1), gains["query"], 63)
    place = state.position % window
    state.keys[layer, :, place] = normalize(key, gains["key"], 127)
    state.values[layer, :, place] = np.clip(value, -127, 127)
    filled = min(state.position + 1, window)
    ages = (place - np.arange(filled)) % window
    # 128 is what makes keys unsigned; added to all of them, it moves all scores of a head alike.
    products = query @ (state.keys[layer, :, :filled] + 128).transpose(0, 2, 1)
    scores = rescale(products << SCORE_SHIFT, weights.arrays[f"{layer}.scores"].astype(np.int64)[:, None])
    scores = scores + weights.arrays[f"{layer}.distance"].astype(np.int64)[:, ages]
    soft = power(scores.max(-1, keepdims=True) - scores, high=14)
    mixed = rescale(soft @ state.values[layer, :, :filled], quotient(gains["mixed"], soft.sum(-1))[..., None])
    return _product(weights, f"{layer}.out", np.clip(mixed, -127, 127).reshape(len(x), -1))
