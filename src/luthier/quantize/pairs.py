"""Which channels rotate together: K rounds of disjoint pairs in every group (arXiv 2511.10645, section 3.2).

The reference draws them at random; `round_robin_pairs` is a 1-factorisation instead, complete and without repeats.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CheckpointError

Pairs = tuple[NDArray[np.int16], NDArray[np.bool_]]


def random_pairs(channels: int, *, group_size: int, rounds: int, seed: int) -> Pairs:
    """The reference's pairs, drawn by Python's generator: (pairs (K, in) int16, filler (K, in / 2) bool).

    `pairs[r, g·G + 2t]` and the entry after it are the local channels, 0 to G - 1, of pair t of group g in round r.
    Each group shuffles all its pairs once; a round takes, from the start, those that are free and that no earlier round
    used. A round that comes up short is filled with its free channels in ascending order; `filler` marks those pairs,
    whose angles stay 0.
    """
    draw = random.Random(seed)
    groups = [_random_group(draw, group_size, rounds) for _ in range(_num_groups(channels, group_size))]
    return np.concatenate([pairs for pairs, _ in groups], 1), np.concatenate([filler for _, filler in groups], 1)


def _random_group(draw: random.Random, size: int, rounds: int) -> Pairs:
    candidates = list(combinations(range(size), 2))
    draw.shuffle(candidates)
    pairs, filler = np.empty((rounds, size), np.int16), np.zeros((rounds, size // 2), np.bool_)
    for r in range(rounds):
        free, taken = set(range(size)), list[tuple[int, int]]()
        left = list[tuple[int, int]]()
        for pair in candidates:
            if pair[0] in free and pair[1] in free:
                free.difference_update(pair)
                taken.append(pair)
            else:
                left.append(pair)
        candidates = left
        filler[r, len(taken) :] = True
        pairs[r] = [channel for pair in taken for channel in pair] + sorted(free)
    return pairs, filler


def round_robin_pairs(channels: int, *, group_size: int, rounds: int, seed: int) -> Pairs:
    """K perfect matchings without repeats, by the circle method over channels shuffled by group; shapes as above."""
    if rounds >= group_size:
        raise ValueError(f"a group of {group_size} channels has {group_size - 1} disjoint rounds, got {rounds}")
    draw = random.Random(seed)
    groups = _num_groups(channels, group_size)
    pairs = np.empty((rounds, groups, group_size // 2, 2), np.int16)
    for group in range(groups):
        names = np.asarray(draw.sample(range(group_size), group_size))
        for r in range(rounds):
            circle = np.concatenate([names[:1], np.roll(names[1:], r)])
            pairs[r, group] = np.stack([circle[: group_size // 2], circle[: group_size // 2 - 1 : -1]], 1)
    return pairs.reshape(rounds, channels), np.zeros((rounds, channels // 2), np.bool_)


PAIRINGS: dict[str, Callable[..., Pairs]] = {"random": random_pairs, "round-robin": round_robin_pairs}


def check_pairs(pairs: NDArray[np.int16], group_size: int, name: str) -> None:
    """CheckpointError unless every group of every round of pairs (K, in) is a permutation of 0 to G - 1."""
    if pairs.ndim != 2 or pairs.shape[1] % group_size:
        raise CheckpointError(
            f"{name}: got pairs of shape {pairs.shape}, expected (rounds, channels) in groups of {group_size}",
            hint="check group_size in config.json, or write the checkpoint again",
        )
    ordered = np.sort(pairs.reshape(len(pairs), pairs.shape[1] // group_size, group_size), -1)
    wrong = np.argwhere((ordered != np.arange(group_size)).any(-1))
    if len(wrong):
        r, group = wrong[0]
        raise CheckpointError(
            f"{name}: the pairs of round {r}, group {group} are no permutation of 0 to {group_size - 1}",
            hint="the file is damaged or of another format: write the checkpoint again",
        )


def _num_groups(channels: int, group_size: int) -> int:
    if channels % group_size or group_size % 2:
        raise ValueError(f"{channels} channels cannot be divided into groups of {group_size} with an even size")
    return channels // group_size
