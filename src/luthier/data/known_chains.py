"""Known sources that carry a state along: Markov chains, n-grams of a text, hidden Markov models, latent classes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from luthier.core.errors import ConfigError
from luthier.data.known import Floats, KnownSource, Tokens, categorical, dirichlet_rows, entropy_of, nats_of

MOST_ENTRIES = 1 << 25  # of a table of probabilities: 256 MB


class _Chain(KnownSource):
    """A stationary Markov chain of order k over V tokens: what Markov and NGram share."""

    order: int

    @property
    @abstractmethod
    def table(self) -> tuple[Floats, Floats]:
        """Probability of each context (V^k,) when stationary, and of each token after it (V^k, V)."""

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length): a context as often as it occurs, then one token after the other."""
        stationary, rows = self.table
        size = self.vocab_size
        context = rng.choice(len(stationary), segments, p=stationary)
        tokens = np.empty((segments, max(length, self.order)), np.int64)
        for place in range(self.order):
            tokens[:, place] = context // size ** (self.order - 1 - place) % size
        for place in range(self.order, length):
            tokens[:, place] = categorical(rng, rows[context])
            context = (context * size + tokens[:, place]) % len(stationary)
        return tokens[:, :length]

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats."""
        stationary, rows = self.table
        surprisal, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
        context, dead = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), bool)
        row_entropy = entropy_of(rows)
        for place, column in enumerate(tokens.T):
            if place < self.order:
                nexts = _conditional(stationary, self.vocab_size, place)[context]
                entropy[:, place] = entropy_of(nexts)
            else:
                nexts = rows[context]
                entropy[:, place] = row_entropy[context]
            surprisal[:, place] = nats_of(nexts[np.arange(len(column)), column])
            context = (context * self.vocab_size + column) % len(stationary)
            surprisal[dead, place] = entropy[dead, place] = 0
            dead |= np.isinf(surprisal[:, place])
        return surprisal, entropy

    def rate(self, length: int) -> float:
        """Entropy of a segment in nats per token: that of its opening, then sum over contexts of pi_c H(row_c)."""
        stationary, rows = self.table
        known = min(length, self.order)
        opening = entropy_of(stationary.reshape(self.vocab_size**known, -1).sum(1))
        return float(opening + (length - known) * (stationary @ entropy_of(rows))) / length


@dataclass(frozen=True, kw_only=True)
class Markov(_Chain):
    """A Markov chain whose rows are drawn from a Dirichlet distribution; it starts in its stationary state."""

    vocab_size: int = 8
    """Number of different tokens V."""
    order: int = 2
    """Tokens that the next one depends on, k."""
    concentration: float = 0.4
    """Of the Dirichlet distribution: the smaller, the more predictable."""
    table_seed: int = 0
    """Which chain; the seed of `sample` is another."""

    def __post_init__(self) -> None:
        _check_table(self.vocab_size, self.order)

    @cached_property
    def table(self) -> tuple[Floats, Floats]:
        """Probability of each context (V^k,) when stationary, and of each token after it (V^k, V)."""
        shape = (self.vocab_size**self.order, self.vocab_size)
        rows = dirichlet_rows(self.concentration, shape, self.table_seed, "markov")
        return _stationary(rows), rows


@dataclass(frozen=True, kw_only=True)
class NGram(_Chain):
    """Characters with the n-gram statistics of a text: realistic frequencies, yet the truth is known.

    Counts are taken around the text as if it were a circle, so that every context has a successor and the frequencies
    of the text are exactly the stationary ones of the chain.
    """

    text: str = ""
    """What to imitate; empty: the language reference that every Python installation carries."""
    order: int = 2
    """Characters that the next one depends on: 2 for trigrams."""

    def __post_init__(self) -> None:
        _check_table(self.vocab_size, self.order)

    @cached_property
    def fitted(self) -> str:
        """The text that was counted."""
        from pydoc_data.topics import topics

        return self.text or "\n".join(topics.values())

    @cached_property
    def alphabet(self) -> str:
        """The character of each token."""
        return "".join(sorted(set(self.fitted)))

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of different characters."""
        return len(self.alphabet)

    @cached_property
    def table(self) -> tuple[Floats, Floats]:
        """Probability of each context (V^k,), and of each character after it (V^k, V); rows of no use are uniform."""
        characters = np.frombuffer(self.fitted.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(np.frombuffer(self.alphabet.encode("utf-32-le"), np.uint32), characters)
        grams = np.zeros_like(tokens)
        for shift in range(self.order, -1, -1):
            grams = grams * self.vocab_size + np.roll(tokens, shift)
        counts = np.bincount(grams, minlength=self.vocab_size ** (self.order + 1)).reshape(-1, self.vocab_size)
        total = counts.sum(1)
        rows = np.where(total[:, None] > 0, counts / np.maximum(total, 1)[:, None], 1 / self.vocab_size)
        return total / total.sum(), rows


class _Hidden(KnownSource):
    """Tokens that depend on a hidden state only, scored by the forward algorithm: HiddenMarkov and Latent."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[Floats, Floats, Floats]:
        """Probabilities of the first state (K,), of the next state (K, K), and of tokens by state (K, V)."""

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length): the states first, then what they emit."""
        initial, transition, emission = self.parameters
        tokens = np.empty((segments, length), np.int64)
        state = categorical(rng, np.broadcast_to(initial, (segments, len(initial))))
        for place in range(length):
            tokens[:, place] = categorical(rng, emission[state])
            state = categorical(rng, transition[state])
        return tokens

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy (S, T) in nats: the normalizers of the forward algorithm."""
        initial, transition, emission = self.parameters
        surprisal, entropy = np.empty(tokens.shape), np.empty(tokens.shape)
        belief = np.tile(initial, (len(tokens), 1))
        for place, column in enumerate(tokens.T):
            nexts = belief @ emission
            entropy[:, place] = entropy_of(nexts)
            joint = belief * emission[:, column].T
            total = joint.sum(1)
            surprisal[:, place] = nats_of(total)
            belief = (joint / total[:, None]) @ transition
        return surprisal, entropy


@dataclass(frozen=True, kw_only=True)
class Latent(_Hidden):
    """A class is drawn for each segment, then independent tokens of that class.

    Here a vector that tells the class beforehand should help most. It cannot help in the end: the best code without it
    is the mixture over classes, which is the truth here.
    """

    vocab_size: int = 16
    """Number of different tokens V."""
    classes: int = 16
    """Number of classes K, equally frequent."""
    concentration: float = 0.4
    """Of the Dirichlet distribution of the classes' frequencies: the smaller, the more different they are."""
    table_seed: int = 0
    """Which classes; the seed of `sample` is another."""

    @cached_property
    def parameters(self) -> tuple[Floats, Floats, Floats]:
        """Probabilities of the class (K,), the identity (K, K): it stays, and tokens by class (K, V)."""
        emission = dirichlet_rows(self.concentration, (self.classes, self.vocab_size), self.table_seed, "latent")
        return np.full(self.classes, 1 / self.classes), np.eye(self.classes), emission


@dataclass(frozen=True, kw_only=True)
class HiddenMarkov(_Hidden):
    """A hidden Markov model: states that tend to stay, each with its own tokens; the first is any of them."""

    vocab_size: int = 8
    """Number of different tokens V."""
    states: int = 4
    """Number of hidden states K."""
    stay: float = 0.8
    """Probability to keep the state; else the next one is drawn from a random row."""
    concentration: float = 0.3
    """Of the Dirichlet distributions of rows and tokens."""
    table_seed: int = 0
    """Which model; the seed of `sample` is another."""

    @cached_property
    def parameters(self) -> tuple[Floats, Floats, Floats]:
        """Probabilities of the first state (K,), of the next state (K, K), and of tokens by state (K, V)."""
        moves = dirichlet_rows(self.concentration, (self.states, self.states), self.table_seed, "hmm transition")
        emission = dirichlet_rows(self.concentration, (self.states, self.vocab_size), self.table_seed, "hmm emission")
        transition = self.stay * np.eye(self.states) + (1 - self.stay) * moves
        return np.full(self.states, 1 / self.states), transition, emission


def _stationary(rows: Floats) -> Floats:
    """The distribution over contexts (V^k,) that a step of the chain (V^k, V) leaves as it is, by power iteration."""
    contexts, size = rows.shape
    pi = np.full(contexts, 1 / contexts)
    for _ in range(100_000):
        following = (pi[:, None] * rows).reshape(size, -1).sum(0)  # forget the oldest token
        following = (pi + following) / (2 * pi.sum())  # lazily, so that no cycle can keep it from settling
        if np.abs(following - pi).max() < 1e-17 + 1e-15 * pi.max():
            break
        pi = following
    return following / following.sum()


def _conditional(stationary: Floats, size: int, known: int) -> Floats:
    """(V^known, V) probabilities of the next token of an opening of which `known` tokens are known."""
    joint = stationary.reshape(size**known, size, -1).sum(2)
    total = joint.sum(1, keepdims=True)
    return np.where(total > 0, joint / np.where(total > 0, total, 1), 0)


def _check_table(size: int, order: int) -> None:
    if order < 1 or size < 2 or size ** (order + 1) > MOST_ENTRIES:
        raise ConfigError(
            f"order: got {order} over {size} tokens, expected at least 1, at most {MOST_ENTRIES:,} entries",
            hint="take a lower order, or a text with fewer different characters",
        )
