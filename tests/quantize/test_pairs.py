"""Pairs: golden values of the reference, and what every set of pairs must be."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import CheckpointError
from luthier.quantize.pairs import PAIRINGS, check_pairs, random_pairs, round_robin_pairs


@pytest.mark.parametrize(
    ("channels", "group_size", "seed", "fillers", "digest"),
    [
        (128, 128, 0, [(7, 63)], "489fee27fb2a2198"),
        (256, 128, 0, [(7, 63)], "cdf5a93907a5c3c8"),
        (1024, 128, 5, [(5, 383), (7, 319)], "64879b921e11298f"),
        (128, 64, 0, [(2, 63), (5, 31), (7, 31)], "9d6fd5c90d612342"),
    ],
)
def test_random_pairs_are_those_of_the_reference(
    channels: int, group_size: int, seed: int, fillers: list[tuple[int, int]], digest: str
) -> None:
    pairs, filler = random_pairs(channels, group_size=group_size, rounds=8, seed=seed)
    assert hashlib.sha256(pairs.astype("<i2").tobytes()).hexdigest()[:16] == digest
    assert [tuple(where) for where in np.argwhere(filler).tolist()] == fillers


def test_the_first_pairs_of_a_seed() -> None:
    pairs, _ = random_pairs(128, group_size=128, rounds=8, seed=0)
    assert pairs[0, :12].reshape(-1, 2).tolist() == [[70, 87], [23, 111], [57, 104], [69, 82], [10, 59], [101, 127]]
    pairs, _ = random_pairs(128, group_size=64, rounds=8, seed=0)
    assert pairs[0, :8].reshape(-1, 2).tolist() == [[16, 59], [38, 60], [0, 9], [7, 43]]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(PAIRINGS)),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 3),
    st.integers(0, 16),
    st.integers(0, 10**6),
)
def test_every_round_is_a_permutation_of_each_group(kind: str, size: int, groups: int, rounds: int, seed: int) -> None:
    pairs, filler = PAIRINGS[kind](size * groups, group_size=size, rounds=rounds, seed=seed)
    assert pairs.shape == (rounds, size * groups)
    assert pairs.dtype == np.int16
    assert filler.shape == (rounds, size * groups // 2)
    check_pairs(pairs, size, "test")


@pytest.mark.parametrize("kind", sorted(PAIRINGS))
def test_no_pair_of_a_group_repeats_but_for_fillers(kind: str) -> None:
    pairs, filler = PAIRINGS[kind](64, group_size=32, rounds=16, seed=3)
    for group in range(2):
        chosen = pairs[:, 32 * group : 32 * (group + 1)].reshape(-1, 2)[
            ~filler[:, 16 * group : 16 * (group + 1)].reshape(-1)
        ]
        assert len({frozenset(pair) for pair in chosen.tolist()}) == len(chosen)


def test_round_robin_needs_no_filler_where_random_does() -> None:
    assert random_pairs(128, group_size=64, rounds=8, seed=0)[1].any()
    assert not round_robin_pairs(128, group_size=64, rounds=16, seed=0)[1].any()


def test_groups_and_seeds_differ() -> None:
    pairs, _ = round_robin_pairs(256, group_size=128, rounds=2, seed=0)
    assert (pairs[:, :128] != pairs[:, 128:]).any()
    assert (pairs != round_robin_pairs(256, group_size=128, rounds=2, seed=1)[0]).any()


def test_broken_pairs_are_named() -> None:
    pairs, _ = random_pairs(256, group_size=128, rounds=4, seed=0)
    pairs[2, 130] = pairs[2, 131]
    with pytest.raises(CheckpointError, match="q_proj: the pairs of round 2, group 1 are no permutation"):
        check_pairs(pairs, 128, "q_proj")
    with pytest.raises(CheckpointError, match=r"shape \(4, 200\)"):
        check_pairs(pairs[:, :200], 128, "q_proj")


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="172 channels"):
        random_pairs(172, group_size=128, rounds=8, seed=0)
    with pytest.raises(ValueError, match="31 disjoint rounds"):
        round_robin_pairs(32, group_size=32, rounds=32, seed=0)
