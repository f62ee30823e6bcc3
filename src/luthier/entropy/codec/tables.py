"""The constants of context mixing, made with integers only, so that every machine has the same.

A logit is ln(p / (1 - p)) in steps of 1/256. A history is one byte: what the last bits in a context were, exactly for
the first three, later how many zeros and ones (recent ones count more) and which came last.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONTEXTS = 11
INPUTS = 32
TOP = 2815  # the largest logit
MOST = {0: 40, 1: 30, 2: 12, 3: 6, 4: 5}  # the rarer bit's count -> the largest count of the other
EXACT = 3
FIRST_WEIGHT = 13107  # of 65536
E_FRACTION = 1 << 64

State = tuple[int, int, str]  # zeros, ones, the last bit or (of the first few) all of them


class Tables(NamedTuple):
    """What `mixing.c` and its reference read; shapes and units stand in `mixing.c`."""

    stretch: NDArray[np.int16]
    squash: NDArray[np.uint16]
    reciprocal: NDArray[np.uint32]
    next: NDArray[np.uint8]
    histories: NDArray[np.uint32]
    matches: NDArray[np.uint32]
    weights: NDArray[np.int32]
    kinds: NDArray[np.uint8]
    letters: NDArray[np.uint8]


@functools.cache
def tables() -> Tables:
    """All of them."""
    squash, (following, histories) = _squash(), _histories()
    weights = np.zeros(INPUTS, np.int32)
    weights[0 : 2 * CONTEXTS : 2] = FIRST_WEIGHT
    weights[[22, 23, 24, 27, 28]] = FIRST_WEIGHT  # orders 0 and 1, the match, the network and its refinement
    unlikely = [4194303 // (length + 2) for length in range(32)]
    matches = [p << 10 for low in unlikely for p in (low, 4194303 - low)]
    return Tables(
        _stretch(squash),
        squash,
        np.array([655360 // (10 * visits + 16) for visits in range(1024)], np.uint32),
        following,
        histories,
        np.array(matches, np.uint32),
        weights,
        np.array([_kind(byte) for byte in range(256)], np.uint8),
        np.array([_letter(byte) for byte in range(256)], np.uint8),
    )


def _squash() -> NDArray[np.uint16]:
    """p16 of every logit from -TOP - 1 to TOP: 65536 / (1 + e^-x), rounded down."""
    term, step = E_FRACTION, 0
    for k in range(1, 12):  # e^(-1/256) by its series
        step += term if k % 2 else -term
        term //= 256 * k
    decay, powers = step, [E_FRACTION]
    for _ in range(TOP + 1):
        powers.append((powers[-1] * decay) >> 64)
    right = [65536 * E_FRACTION // (E_FRACTION + power) for power in powers]
    return np.array([max(1, 65536 - p) for p in right[TOP + 1 : 0 : -1]] + right[: TOP + 1], np.uint16)


def _stretch(squash: NDArray[np.uint16]) -> NDArray[np.int16]:
    """The logit whose probability comes closest to (p + 1/2) / 4096 from below."""
    logits = np.searchsorted(squash, 16 * np.arange(4096) + 8, side="right") - 1 - (TOP + 1)
    return np.clip(logits, -2130, 2130).astype(np.int16)


def _histories() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """What follows each history after a zero and a one, and the probability that it starts with; rare ones first."""
    known, queue = {(0, 0, ""): None}, [(0, 0, "")]
    for state in queue:
        for bit in "01":
            after = _after(state, bit)
            if after not in known:
                known[after] = None
                queue.append(after)
    order = sorted(known, key=lambda state: (state[0] + state[1], state))
    number = {state: index for index, state in enumerate(order)}
    following = np.zeros((256, 2), np.uint8)
    first = np.zeros(256, np.uint32)
    for index, (zeros, ones, last) in enumerate(order):
        following[index] = [number[_after((zeros, ones, last), bit)] for bit in "01"]
        first[index] = (10 * ones + 4) * 4194303 // (10 * (zeros + ones) + 8) << 10
    return following, first


def _after(state: State, bit: str) -> State:
    zeros, ones, last = state
    if zeros + ones < EXACT:
        return zeros + (bit == "0"), ones + (bit == "1"), last + bit
    counts = [zeros, ones]
    same, other = int(bit), 1 - int(bit)
    counts[same] += 1
    if counts[other] > 2:
        counts[other] = 2 + (counts[other] - 2) // 3
    while max(counts) > MOST.get(min(counts), 0):
        counts[0 if counts[0] >= counts[1] else 1] -= 1
    return counts[0], counts[1], bit


def _kind(byte: int) -> int:
    ranges = (b"az", b"AZ", b"  ", b"\n\n", b"09", b"\x80\xff", b"\x00?")
    return next((kind for kind, ends in enumerate(ranges) if ends[0] <= byte <= ends[1]), 7)


def _letter(byte: int) -> int:
    character = chr(byte)
    return ord(character.lower()) if character.isascii() and character.isalpha() else byte * (byte > 127 or byte == 39)
