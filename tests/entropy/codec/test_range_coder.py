"""The range coder gives back what it got, and spends what the probabilities say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.entropy.codec.range_coder import Decoder, Encoder

Bits = list[tuple[int, int]]


def encoded(bits: Bits) -> bytes:
    encoder = Encoder()
    for bit, p16 in bits:
        encoder.code(bit, p16)
    return encoder.finish()


def ideal(bits: Bits) -> float:
    return -sum(math.log2((p16 if bit else 65536 - p16) / 65536) for bit, p16 in bits)


def drawn(count: int, seed: int) -> Bits:
    draw = random.Random(seed)
    probabilities = [min(max(int(65536 * draw.betavariate(0.3, 0.3)), 1), 65535) for _ in range(count)]
    return [(int(draw.random() * 65536 < p16), p16) for p16 in probabilities]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 65535))))
def test_what_goes_in_comes_out(bits: Bits) -> None:
    decoder = Decoder(encoded(bits))
    assert [decoder.code(0, p16) for _, p16 in bits] == [bit for bit, _ in bits]


def test_carries_run_back_through_the_message() -> None:
    """Zeros near the top of the interval: low grows to the very edge, and a last zero pushes it over."""
    draw = random.Random(1)
    for _ in range(200):
        bits = [(0, 65535)] * draw.randint(1, 9) + [(draw.getrandbits(1), draw.choice((1, 2, 65534, 65535)))] * 20
        decoder = Decoder(encoded(bits))
        assert [decoder.code(0, p16) for _, p16 in bits] == [bit for bit, _ in bits]


def test_it_costs_what_the_probabilities_say() -> None:
    bits = drawn(20_000, seed=0)
    assert ideal(bits) <= 8 * len(encoded(bits)) <= ideal(bits) * 1.001 + 16


def test_it_is_as_short_as_constriction() -> None:
    constriction = pytest.importorskip("constriction", reason="the oracle is not installed")
    import numpy as np

    bits = drawn(20_000, seed=2)
    oracle = constriction.stream.queue.RangeEncoder()
    model = constriction.stream.model.Bernoulli()
    symbols = np.array([bit for bit, _ in bits], np.int32)
    oracle.encode(symbols, model, np.array([p16 / 65536 for _, p16 in bits]))
    assert len(encoded(bits)) <= 4 * len(oracle.get_compressed()) * 1.0005 + 4
