"""What a source of known entropy is: tokens together with the exact surprisal and entropy of each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.core.seeds import derive_seed

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class KnownSample:
    """Segments of a known source, with the truth about every token."""

    tokens: Tokens
    """(S, T) token ids."""
    surprisal: Floats
    """(S, T) nats: -ln p(x_t | x_<t)."""
    entropy: Floats
    """(S, T) nats: H(X_t | x_<t), the expected surprisal given what came before."""
    rate: float | None
    """Expected surprisal in nats per token over segments of this length; None where there is no closed form."""


class KnownSource(ABC):
    """A distribution over segments of tokens 0 .. vocab_size - 1; segments are independent of each other."""

    vocab_size: int

    def sample(self, segments: int, length: int, seed: int) -> KnownSample:
        """Draw segments, with the truth about every token; equal arguments give equal samples."""
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "known source", type(self).__name__)))
        tokens = self.draw(rng, segments, length)
        surprisal, entropy = self.score(tokens)
        return KnownSample(tokens=tokens, surprisal=surprisal, entropy=entropy, rate=self.rate(length))

    @abstractmethod
    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length) as the source makes them."""

    @abstractmethod
    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy in nats, both (S, T), of any tokens (S, T). An impossible token has infinite surprisal.

        What follows an impossible token is undefined: zeros.
        """

    def rate(self, length: int) -> float | None:
        """Entropy of a segment of `length` tokens in nats per token; None where there is no closed form."""
        return None


def entropy_of(p: Floats) -> Floats:
    """Entropy in nats of distributions (..., V): (...)."""
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def nats_of(p: Floats) -> Floats:
    """-ln p, infinite for what is impossible."""
    return np.where(p > 0, -np.log(np.where(p > 0, p, 1)), np.inf)


def categorical(rng: np.random.Generator, p: Floats) -> Tokens:
    """One draw from each distribution (..., V): (...)."""
    draws = rng.random(p.shape[:-1])
    cumulative = np.cumsum(p, -1)
    # Rounding may leave the last sum below 1: the draw is scaled by it, so that nothing impossible is drawn.
    return (draws[..., None] * cumulative[..., -1:] >= cumulative).sum(-1)


def dirichlet_rows(concentration: float, shape: tuple[int, int], seed: int, purpose: str) -> Floats:
    """Rows of random probabilities, none of them zero."""
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "known source", purpose)))
    rows = np.maximum(rng.dirichlet([concentration] * shape[1], shape[0]), 1e-12)
    return rows / rows.sum(1, keepdims=True)
