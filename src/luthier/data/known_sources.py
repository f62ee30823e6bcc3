"""Sources of tokens whose entropy is known: for each token its exact surprisal and the exact entropy before it.

| name    | source                                                | closed form of a segment's entropy |
|---------|-------------------------------------------------------|------------------------------------|
| iid     | independent tokens                                    | yes                                |
| markov  | Markov chain of order k with random rows              | yes                                |
| latent  | a hidden class per segment, then independent tokens   | no                                 |
| hmm     | hidden Markov model                                   | no                                 |
| grammar | sentences of a context-free grammar                   | no                                 |
| copy    | random tokens, then the same with errors              | yes                                |
| hash    | a counter through SHA-256: random to all, yet a seed  | yes                                |
| ngram   | n-grams fitted on English text, then sampled          | yes                                |

They test whatever claims to estimate entropy: no code length may fall below the truth, on average. Surprisal is
-ln p(x_t | x_<t) of the token that came, entropy is its expectation H(X_t | x_<t); both in nats, the first token
included. Drawing and scoring are written independently: a latent source draws its hidden state, its score sums over it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luthier.core.errors import ConfigError
from luthier.data.grammar import ENGLISH, Grammar
from luthier.data.known import Floats, KnownSource, Tokens, categorical, entropy_of, nats_of
from luthier.data.known import KnownSample as KnownSample
from luthier.data.known_chains import HiddenMarkov as HiddenMarkov
from luthier.data.known_chains import Latent as Latent
from luthier.data.known_chains import Markov as Markov
from luthier.data.known_chains import NGram as NGram


@dataclass(frozen=True, kw_only=True)
class Independent(KnownSource):
    """Independent tokens of one distribution: nothing to learn but their frequencies."""

    probabilities: tuple[float, ...] = (1 / 16,) * 16
    """Of each token; they sum to 1."""

    def __post_init__(self) -> None:
        if min(self.probabilities) < 0 or abs(sum(self.probabilities) - 1) > 1e-9:
            raise ConfigError(
                f"probabilities: got a sum of {sum(self.probabilities):.6g}", hint="they must be positive and sum to 1"
            )

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of different tokens."""
        return len(self.probabilities)

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length)."""
        return categorical(rng, np.broadcast_to(self.probabilities, (segments, length, self.vocab_size)))

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats."""
        p = np.asarray(self.probabilities)
        return nats_of(p[tokens]), np.full(tokens.shape, entropy_of(p))

    def rate(self, length: int) -> float:
        """Entropy in nats per token."""
        return float(entropy_of(np.asarray(self.probabilities)))


@dataclass(frozen=True, kw_only=True)
class GrammarSource(KnownSource):
    """Sentences of a probabilistic context-free grammar, each closed by an end token, cut where the segment ends."""

    grammar: Grammar = ENGLISH
    """Rules with their probabilities."""

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of words, and the end token, which is the last."""
        return len(self.grammar.words) + 1

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length): leftmost derivations, one sentence after the other."""
        return self.grammar.draw(rng, segments, length)

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats, from prefix probabilities."""
        return self.grammar.score(tokens)


@dataclass(frozen=True, kw_only=True)
class NoisyCopy(KnownSource):
    """Uniform tokens, then the same again, where some are drawn anew: dependence across half a segment."""

    vocab_size: int = 16
    """Number of different tokens V."""
    noise: float = 0.25
    """Probability r that a copied token is drawn anew; the copy is right with probability 1 - r + r/V."""

    def __post_init__(self) -> None:
        if not 0 < self.noise <= 1 or self.vocab_size < 2:
            raise ConfigError(
                f"noise: got {self.noise} over {self.vocab_size} tokens", hint="0 < noise <= 1, at least two tokens"
            )

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length); the first half is the longer one where the length is odd."""
        half = length - length // 2
        fresh = rng.integers(0, self.vocab_size, (segments, length))
        kept = rng.random((segments, length - half)) >= self.noise
        fresh[:, half:] = np.where(kept, fresh[:, : length - half], fresh[:, half:])
        return fresh

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats."""
        length = tokens.shape[1]
        half = length - length // 2
        surprisal, entropy = (np.full(tokens.shape, np.log(self.vocab_size)) for _ in range(2))
        right = tokens[:, half:] == tokens[:, : length - half]
        surprisal[:, half:] = np.where(right, -np.log(self._hit), -np.log(self._miss))
        entropy[:, half:] = self._copy_entropy
        return surprisal, entropy

    def rate(self, length: int) -> float:
        """Entropy of a segment in nats per token."""
        copied = length // 2
        return float((length - copied) * np.log(self.vocab_size) + copied * self._copy_entropy) / length

    @property
    def _hit(self) -> float:
        return 1 - self.noise + self._miss

    @property
    def _miss(self) -> float:
        return self.noise / self.vocab_size

    @property
    def _copy_entropy(self) -> float:
        return float(-self._hit * np.log(self._hit) - (self.vocab_size - 1) * self._miss * np.log(self._miss))


@dataclass(frozen=True, kw_only=True)
class HashStream(KnownSource):
    """SHA-256 of a counter and a seed of a few bits: its entropy is that seed, and nobody will say so.

    After some tokens the seed is settled and the rest is certain, but every estimator must say log V per token: an
    upper bound can be arbitrarily loose. The truth is known because all seeds are tried.
    """

    vocab_size: int = 256
    """Number of different tokens V: a divisor of 256."""
    seed_bits: int = 16
    """Length of the hidden seed of each segment."""

    def __post_init__(self) -> None:
        if not 2 <= self.vocab_size <= 256 or 256 % self.vocab_size or not 1 <= self.seed_bits <= 20:
            raise ConfigError(
                f"hash: got {self.vocab_size} tokens and {self.seed_bits} bits",
                hint="the number of tokens divides 256, and a seed has 1 to 20 bits, as all of them are tried",
            )

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length), each segment from a seed of its own."""
        return self._stream(rng.integers(0, 1 << self.seed_bits, segments), length)

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats, from how many seeds agree with each beginning."""
        surprisal, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
        node, seeds = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64)
        place, size = 0, self.vocab_size
        for keys, counts, node_entropy, first in self._tree(tokens.shape[1]):
            alive = node >= 0
            wanted = node * size + tokens[:, place]
            child = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found = (keys[child] == wanted) & alive
            before = np.bincount(keys // size, counts)[np.maximum(node, 0)]
            surprisal[:, place] = np.where(alive, nats_of(np.where(found, counts[child] / before, 0)), 0)
            entropy[:, place] = np.where(alive, node_entropy[np.maximum(node, 0)], 0)
            node, seeds = np.where(found, child, -1), first[child]
            place += 1
        rest = self._stream(seeds, tokens.shape[1]) != tokens
        rest[:, :place] = False
        wrong = rest.any(1) & (node >= 0)
        surprisal[wrong, rest[wrong].argmax(1)] = np.inf
        return surprisal, entropy

    def rate(self, length: int) -> float:
        """Entropy of a segment in nats per token: the bits of the seed, or of as much of it as shows so early."""
        *_, (_, counts, _, _) = self._tree(length)
        return float(entropy_of(counts / counts.sum())) / length

    def _stream(self, seeds: Tokens, length: int) -> Tokens:
        """(N, length) tokens, 32 from each hash of (seed, counter)."""
        blocks = range(-(-length // 32))
        text = b"".join(
            hashlib.sha256(seed.to_bytes(8, "little") + block.to_bytes(8, "little")).digest()
            for seed in seeds.tolist()
            for block in blocks
        )
        streams = np.frombuffer(text, np.uint8).reshape(len(seeds), -1)[:, :length]
        return streams.astype(np.int64) % self.vocab_size

    def _tree(self, length: int) -> Iterator[tuple[Tokens, Tokens, Floats, Tokens]]:
        """The tree of all streams, level by level, until every stream is alone or `length` is reached.

        Yields keys (node of the level above * V + token), ascending; how many seeds and which is the first of them in
        each; and the entropy of what follows each node of the level above.
        """
        seeds = np.arange(1 << self.seed_bits)
        streams = self._stream(seeds, min(length, 32))
        node = np.zeros(len(seeds), np.int64)
        for place in range(length):
            if place >= streams.shape[1]:
                streams = self._stream(seeds, min(length, 2 * place))
            keys, first, node, counts = np.unique(
                node * self.vocab_size + streams[:, place], return_index=True, return_inverse=True, return_counts=True
            )
            parent = keys // self.vocab_size
            total = np.bincount(parent, counts)
            share = counts / total[parent]
            yield (
                keys,
                counts.astype(np.int64),
                np.asarray(np.bincount(parent, -share * np.log(share)), np.float64),
                first.astype(np.int64),
            )
            if len(keys) == len(seeds):
                return


KNOWN_SOURCES: dict[str, type[KnownSource]] = {
    "iid": Independent,
    "markov": Markov,
    "latent": Latent,
    "hmm": HiddenMarkov,
    "grammar": GrammarSource,
    "copy": NoisyCopy,
    "hash": HashStream,
    "ngram": NGram,
}
