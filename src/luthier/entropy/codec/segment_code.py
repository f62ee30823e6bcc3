"""The code of a segment: a few levels that tell a network, before the first byte, what text is coming.

A network may know m dimensions of L levels. A code gives the levels of the first of them, and stands in a file as one
number, the fewest bytes for it: levels plus one are the digits (1 to L) of its numeral in base L, the first one lowest.
So 0 is no code, and all numbers up to `most_codes` are codes.

An encoder made the codes in training. Here they are found by search: what counts is the length of the text under the
network itself, and a search needs no second network. It goes dimension by dimension, over a sample of the text.

Departures from the paper: codes are nested (any number of the first dimensions may be sent), no encoder is part of the
codec, and a frame without a code is always an option, so that a code never costs more than it saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from luthier.entropy.codec.frames import Network

PIECES, PIECE_BYTES = 8, 512  # of a sample
Code = tuple[int, ...]


def most_codes(dims: int, levels: int) -> int:
    """How many codes there are: the largest number of one."""
    return sum(levels ** (i + 1) for i in range(dims))


def number_of(code: Code, levels: int) -> int:
    """The number of a code, 0 for none."""
    return sum((level + 1) * levels**i for i, level in enumerate(code))


def code_of(number: int, levels: int) -> Code:
    """The code of a number."""
    code = []
    while number:
        number, level = divmod(number - 1, levels)
        code.append(level)
    return tuple(code)


def varint_bytes(number: int) -> int:
    """Bytes that a number takes in a file."""
    return max(1, -(-number.bit_length() // 7))


def network_bits(network: Network, text: NDArray[np.uint8], code: Code = ()) -> float:
    """Bits of streams (B, T) under a network that was given a code: what an ideal coder would write."""
    state, bits, every = network.open(len(text), code), 0.0, np.arange(len(text))
    for column in text.T:
        counts = network.probabilities(state)
        bits -= float(np.log2(counts[every, column] / counts.sum(1, dtype=np.float64)).sum())
        network.advance(state, np.ascontiguousarray(column))
    return bits


def sample_of(data: bytes) -> NDArray[np.uint8]:
    """Pieces of the data (B, T), at most 4 KiB in all, evenly spread."""
    pieces = min(PIECES, max(1, len(data) // PIECE_BYTES))
    size = min(PIECE_BYTES, len(data))
    firsts = np.linspace(0, len(data) - size, pieces).astype(np.int64)
    return np.stack([np.frombuffer(data, np.uint8, size, int(first)) for first in firsts])


def find_code(network: Network, data: bytes) -> Code:
    """The code under which `data` should be shortest, the code's own bytes included; () where that is without one.

    Greedy: each dimension takes the level that suits the sample best, after those before it. The network reads the
    sample m L + 1 times.
    """
    if not network.dims:
        return ()
    sample = sample_of(data)
    share = sample.size / len(data)
    code: Code = ()
    best = network_bits(network, sample), code
    for _ in range(network.dims):
        bits, code = min((network_bits(network, sample, (*code, i)), (*code, i)) for i in range(network.levels))
        best = min(best, (bits + 8 * share * varint_bytes(number_of(code, network.levels)), code))
    return best[1]
