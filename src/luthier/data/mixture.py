"""In which order a model sees the windows of its corpora: a pure function of the step, whatever the world size.

Batch s is made of the global samples s*G ... s*G + G - 1, where G is the global batch size; rank r of W takes the r-th
of W consecutive parts. So a run may stop on 8 devices and go on with 2, and see exactly the same batches.

One corpus (Instella, arXiv 2511.10628): the windows of epoch e are permuted by PCG64(seed + e), and an incomplete
last batch of an epoch is left out.

Several corpora: each walks through permutations of its own, at its own pace. Which corpus sample i comes from is drawn
without replacement inside blocks of consecutive samples, so that after every block each corpus has had its share of all
samples so far, rounded; the position inside the corpus then follows by counting. Nothing is replayed to find the batch
of a step.

Departure from Instella, which strides ranks through the permutation: there the content of a batch depends on the number
of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.core.seeds import derive_seed
from luthier.data.shards import TokenShards

STATE_VERSION = 1
MIN_BLOCK = 1024  # samples among which the corpora are shuffled
SKIP_EVERY = 128  # tokens between two skips of stretched positions, on average
SMALLEST_SHARE = 1e-6  # of a corpus: a block, which is held in memory, is as long as two of its samples are apart


class WindowMixture:
    """Batches of windows from weighted token shards, and a cursor that says which batch comes next.

    A permutation of all windows of a corpus is held in memory (two around the end of an epoch), at 4 bytes per window,
    8 beyond 2^32 windows: with windows of 4096 tokens, 1 GB per trillion tokens.
    """

    def __init__(
        self,
        shards: Sequence[TokenShards],
        weights: Sequence[float] | None = None,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        """weights: shares of the sequences (any positive scale); by default in proportion to the tokens.

        sequence_length: input positions of a window. batch_size: sequences per global batch.
        Raises: ConfigError for impossible settings; DataError when a corpus is shorter than a window, or the only
        corpus shorter than a batch.
        """
        weights = [part.num_tokens for part in shards] if weights is None else weights
        if len(weights) != len(shards) or not shards or not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(
                f"{len(shards)} corpora with weights {list(weights)}: one positive weight for each is expected",
                hint="leave a corpus out instead of giving it no weight",
            )
        if sequence_length < 1 or batch_size < 1 or seed < 0:
            raise ConfigError(
                f"sequence length {sequence_length} and batch size {batch_size} must be positive, and seed {seed} not "
                "negative",
                hint="256 tokens and 16 sequences suit a laptop",
            )
        self.shards, self.sequence_length, self.batch_size, self.seed = tuple(shards), sequence_length, batch_size, seed
        total = sum(map(Fraction, weights))
        self.weights = tuple(Fraction(weight) / total for weight in weights)
        if (share := min(self.weights)) < SMALLEST_SHARE:
            name = self.shards[self.weights.index(share)].name
            raise ConfigError(
                f"{name}: {float(share):.1e} of all sequences, expected at least {SMALLEST_SHARE:.0e}",
                hint="give it a larger weight, or leave it out",
            )
        self.step = 0
        # With two samples of every corpus in a block on average, rounding cannot make a block's count negative.
        self.block_size = max(MIN_BLOCK, *(int(2 / weight) + 1 for weight in self.weights))
        self._epoch_sizes = [self._epoch_size(part) for part in self.shards]
        self._permutation = functools.lru_cache(maxsize=2 * len(self.shards))(self._draw_permutation)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1, *, document_ids: bool = False, stretch: float = 1.0
    ) -> dict[str, NDArray[np.int64]]:
        """The part of batch `step` that belongs to a rank.

        Returns input_ids and targets [batch_size / world_size, sequence_length]; with `document_ids`, also the document
        of each input position, counted from 0 in each row (for attention masks); with `stretch` above 1, also
        position_ids, which skip now and then so that a row reaches up to about that many times as far.
        Raises: ConfigError when the batch cannot be divided evenly; DataError for document ids of raw tokens.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ConfigError(
                f"a batch of {self.batch_size} sequences cannot be divided for rank {rank} of {world_size}",
                hint="choose a batch size that is a multiple of the number of processes",
            )
        size, length = self.batch_size // world_size, self.sequence_length
        first = step * self.batch_size + rank * size
        places = [self.locate(sample) for sample in range(first, first + size)]
        windows = np.stack([self.shards[source].window(index, length) for source, index in places])
        targets = [self.shards[source].window_targets(index, length) for source, index in places]
        batch = {"input_ids": windows[:, :-1].copy(), "targets": np.stack(targets)}
        if document_ids:
            rows = [self.shards[source].window_document_ids(index, length) for source, index in places]
            batch["document_ids"] = np.stack(rows)
        if stretch > 1:
            batch["position_ids"] = np.stack([self._stretched(first + row, stretch) for row in range(size)])
        return batch

    def _stretched(self, sample: int, stretch: float) -> NDArray[np.int64]:
        """Positions of a sample: mostly one apart, so that neighbors stay neighbors; some samples hardly skip."""
        rng = np.random.default_rng([self.seed, sample])
        stretch = rng.uniform(1, stretch)
        skips = rng.random(self.sequence_length) < 1 / SKIP_EVERY
        longest = int(2 * SKIP_EVERY * (stretch - 1))
        steps = 1 + skips * rng.integers(0, longest, self.sequence_length, endpoint=True)
        return np.cumsum(steps) - steps[0]

    def next_batch(
        self, rank: int = 0, world_size: int = 1, *, document_ids: bool = False, stretch: float = 1.0
    ) -> dict[str, NDArray[np.int64]]:
        """The batch at the cursor, as `batch`; moves the cursor on."""
        batch = self.batch(self.step, rank, world_size, document_ids=document_ids, stretch=stretch)
        self.step += 1
        return batch

    def locate(self, sample: int) -> tuple[int, int]:
        """(corpus, window) of a global sample, both as indices."""
        source, ordinal = self._draw(sample)
        epoch, position = divmod(ordinal, self._epoch_sizes[source])
        return source, int(self._permutation(source, epoch)[position])

    def epochs(self, step: int) -> tuple[float, ...]:
        """How often each corpus has been seen, on average over its windows, before batch `step`."""
        counts = self.counts(step * self.batch_size)
        return tuple(count / size for count, size in zip(counts, self._epoch_sizes, strict=True))

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first `samples` global samples come from each corpus."""
        block, offset = divmod(samples, self.block_size)
        before, layout = self._block(block)
        return tuple((before + np.bincount(layout[:offset], minlength=len(self.shards))).tolist())

    def state_dict(self) -> dict[str, Any]:
        """The cursor and everything that the order depends on, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "weights": [str(weight) for weight in self.weights],
            "tokens": [part.num_tokens for part in self.shards],
            "sha256": [part.sha256 for part in self.shards],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move the cursor to where `state_dict` was taken.

        Raises: CheckpointError naming what differs, when the state belongs to another order of batches.
        """
        own = self.state_dict()
        different = [key for key in own if key != "step" and state.get(key) != own[key]]
        if different or not isinstance(state.get("step"), int):
            changes = ", ".join(f"{key} was {state.get(key)}, now {own[key]}" for key in different or ["step"])
            raise CheckpointError(
                f"the saved position belongs to other data: {changes}",
                hint="restore the data and settings of the run, or start a new one",
            )
        self.step = state["step"]

    def _epoch_size(self, part: TokenShards) -> int:
        """Windows of one epoch."""
        windows = part.num_windows(self.sequence_length)
        needed = self.batch_size if len(self.shards) == 1 else 1
        if windows < needed:
            raise DataError(
                f"{part.name}: {part.num_tokens} tokens make {windows} windows of {self.sequence_length}, but "
                f"{needed} are needed (at least {needed * self.sequence_length + 1} tokens)",
                hint="give more text, a shorter sequence length or a smaller batch size",
            )
        return windows // self.batch_size * self.batch_size if len(self.shards) == 1 else windows

    def _draw(self, sample: int) -> tuple[int, int]:
        """(corpus, how many samples of this corpus come before) of a global sample."""
        block, offset = divmod(sample, self.block_size)
        before, layout = self._block(block)
        source = int(layout[offset])
        return source, int(before[source] + np.count_nonzero(layout[:offset] == source))

    def _counts_before(self, block: int) -> NDArray[np.int64]:
        """Samples of each corpus in all blocks before one: its share, rounded so that the counts add up."""
        edges = np.zeros(len(self.weights) + 1, np.int64)
        share = Fraction(0)
        for source, weight in enumerate(self.weights):
            share += weight
            edges[source + 1] = round(share * block * self.block_size)
        return edges[1:] - edges[:-1]

    def _draw_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples of each corpus before a block, and the corpus of each sample inside it, shuffled."""
        before = self._counts_before(block)
        layout = np.repeat(np.arange(len(self.shards)), self._counts_before(block + 1) - before)
        np.random.Generator(np.random.PCG64(derive_seed(self.seed, "mixture", block))).shuffle(layout)
        return before, layout

    def _draw_permutation(self, source: int, epoch: int) -> NDArray[np.unsignedinteger]:
        """The order of the windows of a corpus in one epoch."""
        base = self.seed if len(self.shards) == 1 else derive_seed(self.seed, "corpus", source)
        windows = self.shards[source].num_windows(self.sequence_length)
        dtype = np.uint32 if windows <= 1 << 32 else np.uint64
        order: NDArray[np.unsignedinteger] = np.arange(windows, dtype=dtype)
        np.random.Generator(np.random.PCG64(base + epoch)).shuffle(order)
        return order
