from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.data.mixture import WindowMixture
from luthier.data.shards import TokenShards

LENGTH = 8


def corpus(name: str, windows: int, first: int = 0) -> TokenShards:
    """Raw tokens in memory, whose window i begins with token first + i * LENGTH."""
    tokens = np.arange(first, first + windows * LENGTH + 1, dtype="<u4")
    ends = np.arange(5, len(tokens) + 5, 5)
    documents = np.stack([ends, ends], axis=1)
    return TokenShards(name, tokens, documents, "tokenizer", "source", sha256=f"{name}-{windows}-{first}")


def windows_of(mixture: WindowMixture, step: int) -> list[int]:
    return (mixture.batch(step)["input_ids"][:, 0] // LENGTH).tolist()


def test_one_corpus_is_the_permutation_of_pcg64() -> None:
    """Batch s of epoch e is the s-th slice of a permutation drawn from PCG64(seed + e); the tail is left out."""
    mixture = WindowMixture([corpus("a", 23)], sequence_length=LENGTH, batch_size=4, seed=6198)
    for epoch in range(3):
        order = np.random.Generator(np.random.PCG64(6198 + epoch)).permutation(23)
        seen = [window for step in range(5) for window in windows_of(mixture, epoch * 5 + step)]
        assert seen == order[:20].tolist()


def test_the_order_of_seed_6198_is_pinned() -> None:
    mixture = WindowMixture([corpus("a", 10)], sequence_length=LENGTH, batch_size=5, seed=6198)
    assert windows_of(mixture, 0) + windows_of(mixture, 1) == [2, 4, 7, 3, 8, 9, 0, 6, 1, 5]


def test_targets_are_the_next_tokens() -> None:
    batch = WindowMixture([corpus("a", 9)], sequence_length=LENGTH, batch_size=3).batch(1)
    assert batch["input_ids"].shape == batch["targets"].shape == (3, LENGTH)
    assert batch["input_ids"].dtype == np.int64
    assert (batch["targets"] == batch["input_ids"] + 1).all()


MIXTURES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(parts=MIXTURES, step=st.integers(0, 2000), seed=st.integers(0, 9))
def test_batches_do_not_depend_on_the_world_size(parts: list[tuple[int, float]], step: int, seed: int) -> None:
    shards = [corpus(str(n), 8 + windows, 10_000 * n) for n, (windows, _) in enumerate(parts)]
    mixture = WindowMixture(shards, [w for _, w in parts], sequence_length=LENGTH, batch_size=8, seed=seed)
    whole = mixture.batch(step, document_ids=True)
    for world_size in (2, 4, 8):
        ranks = [mixture.batch(step, rank, world_size, document_ids=True) for rank in range(world_size)]
        for key in whole:
            assert (np.concatenate([rank[key] for rank in ranks]) == whole[key]).all()


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    def make() -> WindowMixture:
        shards = [corpus("a", 30), corpus("b", 17, 10_000)]
        return WindowMixture(shards, [2, 1], sequence_length=LENGTH, batch_size=4, seed=1)

    straight = make()
    batches = [straight.batch(step)["input_ids"] for step in range(900)]
    assert (make().batch(731)["input_ids"] == batches[731]).all()


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.floats(1e-4, 1), min_size=2, max_size=5),
    samples=st.integers(0, 10_000),
)
def test_weights_are_realized(weights: list[float], samples: int) -> None:
    shards = [corpus(str(n), 50, 10_000 * n) for n in range(len(weights))]
    mixture = WindowMixture(shards, weights, sequence_length=LENGTH, batch_size=4)
    whole_blocks = samples // mixture.block_size * mixture.block_size
    shares = np.asarray(weights) / sum(weights)
    assert np.abs(mixture.counts(whole_blocks) - shares * whole_blocks).max() < 1.001
    assert sum(mixture.counts(samples)) == samples


def test_counts_are_the_samples_that_come() -> None:
    shards = [corpus("a", 50), corpus("b", 9, 10_000)]
    mixture = WindowMixture(shards, [1, 3], sequence_length=LENGTH, batch_size=4)
    drawn = Counter(mixture.locate(sample)[0] for sample in range(1500))
    assert mixture.counts(1500) == (drawn[0], drawn[1])
    assert abs(drawn[0] / 1500 - 0.25) < 0.05


def test_every_corpus_goes_through_all_its_windows_before_repeating() -> None:
    shards = [corpus("a", 50), corpus("b", 9, 10_000)]
    mixture = WindowMixture(shards, [1, 3], sequence_length=LENGTH, batch_size=4)
    drawn = [mixture.locate(sample) for sample in range(400)]
    for source, size in enumerate((50, 9)):
        windows = [window for where, window in drawn if where == source]
        for start in range(0, len(windows) - size + 1, size):
            assert sorted(windows[start : start + size]) == list(range(size))
    assert mixture.epochs(100) == (mixture.counts(400)[0] / 50, mixture.counts(400)[1] / 9)


def test_weights_default_to_the_tokens() -> None:
    mixture = WindowMixture([corpus("a", 60), corpus("b", 20)], sequence_length=LENGTH, batch_size=4)
    assert [float(weight) for weight in mixture.weights] == pytest.approx([481 / 642, 161 / 642])


def test_a_rare_corpus_is_never_rounded_away() -> None:
    shards = [corpus("a", 50), corpus("b", 9)]
    mixture = WindowMixture(shards, [1, 1e-5], sequence_length=LENGTH, batch_size=4)
    assert mixture.counts(1_000_000)[1] in (9, 10, 11)


def test_a_corpus_too_rare_for_a_block_in_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"b: 1\.0e-09"):
        WindowMixture([corpus("a", 50), corpus("b", 9)], [1, 1e-9], sequence_length=LENGTH, batch_size=4)


def test_resume_is_the_same_run_on_any_world_size() -> None:
    def make() -> WindowMixture:
        shards = [corpus("a", 30), corpus("b", 17, 10_000)]
        return WindowMixture(shards, [2, 1], sequence_length=LENGTH, batch_size=4, seed=1)

    straight, first = make(), make()
    batches = [straight.next_batch()["input_ids"] for _ in range(20)]
    for _ in range(7):
        first.next_batch()
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.step == 7
    ranks = [resumed.batch(resumed.step, rank, 2)["input_ids"] for rank in range(2)]
    assert (np.concatenate(ranks) == batches[7]).all()
    assert all((resumed.next_batch()["input_ids"] == batch).all() for batch in batches[7:])


def test_the_cursor_of_other_data_is_refused() -> None:
    state = WindowMixture([corpus("a", 30)], sequence_length=LENGTH, batch_size=4, seed=1).state_dict()
    other_seed = WindowMixture([corpus("a", 30)], sequence_length=LENGTH, batch_size=4, seed=2)
    with pytest.raises(CheckpointError, match=r"other data: seed was 1, now 2$"):
        other_seed.load_state_dict(state)
    other_text = WindowMixture([corpus("b", 30)], sequence_length=LENGTH, batch_size=4, seed=1)
    with pytest.raises(CheckpointError, match=r"sha256 was .*a-30-0.*, now .*b-30-0"):
        other_text.load_state_dict(state)
    assert other_text.step == 0


def test_document_ids_count_from_zero_in_each_row() -> None:
    batch = WindowMixture([corpus("a", 9)], sequence_length=LENGTH, batch_size=9).batch(0, document_ids=True)
    documents = batch["input_ids"] // 5  # the corpus has documents of five tokens
    assert (batch["document_ids"] == documents - documents[:, :1]).all()


def test_corpora_that_are_too_small() -> None:
    with pytest.raises(DataError, match=r"25 tokens make 3 windows of 8, but 4 are needed \(at least 33 tokens\)"):
        WindowMixture([corpus("a", 3)], sequence_length=LENGTH, batch_size=4)
    with pytest.raises(DataError, match="1 tokens make 0 windows of 8, but 1 are needed"):
        WindowMixture([corpus("a", 30), corpus("b", 0)], [1, 1], sequence_length=LENGTH, batch_size=4)


def test_impossible_settings() -> None:
    part = corpus("a", 30)
    for weights in ([1.0, 2.0], [0.0], [float("nan")]):
        with pytest.raises(ConfigError, match="one positive weight"):
            WindowMixture([part], weights, sequence_length=LENGTH, batch_size=4)
    with pytest.raises(ConfigError, match="one positive weight"):
        WindowMixture([], sequence_length=LENGTH, batch_size=4)
    with pytest.raises(ConfigError, match="must be positive"):
        WindowMixture([part], sequence_length=0, batch_size=4)
    with pytest.raises(ConfigError, match="rank 0 of 3"):
        WindowMixture([part], sequence_length=LENGTH, batch_size=4).batch(0, 0, 3)


def test_raw_files_mix_too(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.npy")
    mixture = WindowMixture([TokenShards.from_raw(tmp_path / "a.npy")], sequence_length=LENGTH, batch_size=2)
    batch = mixture.batch(0)
    assert (batch["targets"] == batch["input_ids"] + 1).all()


def test_stretched_positions_skip_now_and_then_and_do_not_depend_on_ranks() -> None:
    length = 4096
    tokens = np.arange(20 * length + 1, dtype="<u4")
    ends = np.asarray([[len(tokens), len(tokens)]])
    long = TokenShards("long", tokens, ends, "tokenizer", "source", sha256="long")
    mixture = WindowMixture([long], sequence_length=length, batch_size=4, seed=1)
    whole = mixture.batch(1, stretch=3.0)["position_ids"]
    parts = [mixture.batch(1, rank, 2, stretch=3.0)["position_ids"] for rank in range(2)]
    assert np.array_equal(whole, np.concatenate(parts))
    gaps = np.diff(whole)
    assert (whole[:, 0] == 0).all()
    assert gaps.min() == 1
    assert 0.005 < (gaps > 1).mean() < 0.01
    reaches = np.concatenate([mixture.batch(step, stretch=3.0)["position_ids"][:, -1] for step in range(5)]) / length
    assert reaches.mean() == pytest.approx(2, rel=0.2)
    assert reaches.min() < 1.5 < 2.5 < reaches.max()
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert "position_ids" not in mixture.batch(1)
