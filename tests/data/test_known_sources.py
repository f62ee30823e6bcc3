"""The truth about known sources is true: against enumeration of all sequences by other means, and closed forms."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import ConfigError
from luthier.data.grammar import ENGLISH, Grammar
from luthier.data.known_sources import (
    KNOWN_SOURCES,
    GrammarSource,
    HashStream,
    HiddenMarkov,
    Independent,
    KnownSource,
    Latent,
    Markov,
    NGram,
    NoisyCopy,
)

LEFT_RECURSIVE = Grammar(rules={"S": {"S A": 0.3, "A S": 0.1, "x": 0.6}, "A": {"x": 0.4, "y": 0.6}})
BRACKETS = Grammar(rules={"S": {"O R": 0.4, "x": 0.6}, "R": {"S C": 1.0}, "O": {"(": 1.0}, "C": {")": 1.0}})
TEXT = "abracadabra"


# The probability of a sequence, worked out as naively as possible.


def independent(source: Any, tokens: tuple[int, ...]) -> float:
    return math.prod(source.probabilities[token] for token in tokens)


def markov(source: Any, tokens: tuple[int, ...]) -> float:
    """Sum over all openings that agree with the tokens, with the stationary state from an eigenvector."""
    _, rows = source.table
    size, order = source.vocab_size, source.order
    contexts = list(itertools.product(range(size), repeat=order))
    step = np.zeros((len(contexts), len(contexts)))
    for row, context in enumerate(contexts):
        for token in range(size):
            step[row, contexts.index((*context[1:], token))] = rows[row, token]
    values, vectors = np.linalg.eig(step.T)
    pi = vectors[:, np.argmax(values.real)].real
    total = 0.0
    for row, context in enumerate(contexts):
        if context[: len(tokens)] != tokens[:order]:
            continue
        chance = pi[row] / pi.sum()
        for place in range(order, len(tokens)):
            chance *= rows[contexts.index(tokens[place - order : place]), tokens[place]]
        total += chance
    return float(total)


def ngram(source: Any, tokens: tuple[int, ...]) -> float:
    """Relative frequencies in the text, read around as a circle."""

    def count(gram: str) -> int:
        around = source.text + source.text[: len(gram) - 1]
        return sum(around[i : i + len(gram)] == gram for i in range(len(source.text)))

    text = "".join(source.alphabet[token] for token in tokens)
    chance = count(text[: source.order]) / len(source.text)
    for place in range(source.order, len(text)):
        context = text[place - source.order : place]
        if not count(context):
            return 0.0
        chance *= count(context + text[place]) / count(context)
    return chance


def hidden(source: Any, tokens: tuple[int, ...]) -> float:
    """Sum over all paths of hidden states."""
    initial, transition, emission = source.parameters
    total = 0.0
    for path in itertools.product(range(len(initial)), repeat=len(tokens)):
        chance = initial[path[0]]
        for before, after in itertools.pairwise(path):
            chance *= transition[before, after]
        total += chance * math.prod(emission[state, token] for state, token in zip(path, tokens, strict=True))
    return float(total)


def copy(source: Any, tokens: tuple[int, ...]) -> float:
    half = len(tokens) - len(tokens) // 2
    chance = source.vocab_size**-half
    for original, copied in zip(tokens, tokens[half:], strict=False):
        chance *= (1 - source.noise) * (original == copied) + source.noise / source.vocab_size
    return chance


def hashed(source: Any, tokens: tuple[int, ...]) -> float:
    """The share of seeds whose stream begins so."""
    hits = 0
    for seed in range(2**source.seed_bits):
        stream = hashlib.sha256(seed.to_bytes(8, "little") + bytes(8)).digest()
        hits += tuple(byte % source.vocab_size for byte in stream[: len(tokens)]) == tokens
    return hits / 2**source.seed_bits


def leftmost(source: Any, tokens: tuple[int, ...]) -> float:
    """All leftmost derivations, step by step, until those left over have no weight."""
    words = [*source.grammar.words, "end"]
    total, states = 0.0, Counter({(0, ("S",)): 1.0})
    while sum(states.values()) > 1e-13:
        following: Counter[tuple[int, tuple[str, ...]]] = Counter()
        for (place, stack), chance in states.items():
            if place == len(tokens):
                total += chance
            elif not stack:
                if words[tokens[place]] == "end":
                    following[place + 1, ("S",)] += chance
            else:
                for side, p in source.grammar.rules[stack[0]].items():
                    if " " in side:
                        following[place, (*side.split(), *stack[1:])] += chance * p
                    elif side == words[tokens[place]]:
                        following[place + 1, stack[1:]] += chance * p
        states = following
    return total


TINY: dict[str, tuple[KnownSource, Callable[[Any, tuple[int, ...]], float], int]] = {
    "iid": (Independent(probabilities=(0.5, 0.3, 0.2, 0.0)), independent, 4),
    "markov": (Markov(vocab_size=3, order=2), markov, 5),
    "markov, shorter than its order": (Markov(vocab_size=3, order=3), markov, 2),
    "latent": (Latent(vocab_size=3, classes=3), hidden, 5),
    "hmm": (HiddenMarkov(vocab_size=3, states=3), hidden, 5),
    "grammar": (GrammarSource(grammar=LEFT_RECURSIVE), leftmost, 4),
    "brackets": (GrammarSource(grammar=BRACKETS), leftmost, 5),
    "copy": (NoisyCopy(vocab_size=3), copy, 5),
    "hash": (HashStream(vocab_size=4, seed_bits=5), hashed, 5),
    "ngram": (NGram(text=TEXT), ngram, 4),
}


@pytest.mark.parametrize("name", TINY)
def test_surprisal_and_entropy_are_those_of_all_sequences(name: str) -> None:
    source, naive, length = TINY[name]
    size = source.vocab_size
    sequences = list(itertools.product(range(size), repeat=length))
    joint = np.array([naive(source, tokens) for tokens in sequences])
    assert joint.sum() == pytest.approx(1, abs=1e-10)
    surprisal, entropy = source.score(np.array(sequences))
    np.testing.assert_allclose(np.exp(-surprisal.sum(1)), joint, atol=1e-12)
    for place in range(length):
        prefixes = joint.reshape(size**place, size, -1).sum(2)
        reached = prefixes.sum(1) > 1e-12
        p = prefixes[reached] / prefixes[reached].sum(1, keepdims=True)
        expected = -(p * np.log(np.where(p > 1e-12, p, 1))).sum(1)
        got = entropy.reshape(size**place, -1, length)[reached][:, :, place]
        alive = joint.reshape(size**place, -1)[reached] > 1e-12  # what follows an impossible token is undefined
        assert np.abs(np.where(alive, got - expected[:, None], 0)).max() < 1e-9
    if source.rate(length) is not None:
        assert source.rate(length) == pytest.approx(-(joint * np.log(np.where(joint > 0, joint, 1))).sum() / length)


SMALL: dict[str, dict[str, Any]] = {"hash": {"vocab_size": 16, "seed_bits": 10}}


@pytest.mark.parametrize("name", KNOWN_SOURCES)
def test_the_mean_surprisal_is_the_rate_within_four_standard_errors(name: str) -> None:
    source = KNOWN_SOURCES[name](**SMALL.get(name, {}))
    found = source.sample(400, 48, seed=1)
    assert found.tokens.shape == found.surprisal.shape == found.entropy.shape == (400, 48)
    assert (found.tokens.dtype, found.surprisal.dtype, found.entropy.dtype) == (np.int64, np.float64, np.float64)
    assert found.tokens.min() >= 0
    assert found.tokens.max() < source.vocab_size
    assert np.isfinite(found.surprisal).all()  # nothing impossible is drawn
    expected = found.entropy if found.rate is None else np.full((400, 48), found.rate)
    for truth in (expected, found.entropy):  # surprisal minus entropy has mean zero for every source
        difference = (found.surprisal - truth).mean(1)
        assert abs(difference.mean()) <= 4 * difference.std() / math.sqrt(400) + 1e-12


@pytest.mark.parametrize("name", KNOWN_SOURCES)
def test_equal_seeds_draw_equal_samples(name: str) -> None:
    source = KNOWN_SOURCES[name](**SMALL.get(name, {}))
    first, again, other = (source.sample(3, 20, seed).tokens for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_order_of_a_chain_decides_what_its_rate_needs() -> None:
    """The rate over long segments approaches sum_c pi_c H(row_c) from above, as the opening knows less."""
    chain = Markov()
    rates = [chain.rate(length) for length in (1, 2, 8, 64, 1 << 20)]
    assert rates == sorted(rates, reverse=True)
    stationary, rows = chain.table
    assert rates[-1] == pytest.approx(-(stationary[:, None] * rows * np.log(rows)).sum(), abs=1e-5)


def test_ngrams_have_the_frequencies_of_their_text() -> None:
    source = NGram(text=TEXT * 3)
    text = "".join(source.alphabet[token] for token in source.sample(2000, 30, 0).tokens.ravel())
    for character in set(TEXT):
        assert text.count(character) / len(text) == pytest.approx(TEXT.count(character) / len(TEXT), abs=0.01)
    pairs = {a + b for a, b in itertools.pairwise(TEXT + TEXT[0])}
    segment = "".join(source.alphabet[token] for token in source.sample(1, 500, 0).tokens[0])
    assert {a + b for a, b in itertools.pairwise(segment)} <= pairs


def test_a_sentence_carries_the_entropy_of_its_derivation() -> None:
    source = GrammarSource(grammar=BRACKETS)  # every sentence has one derivation
    found = source.sample(2000, 40, seed=2)
    ends = found.tokens == source.vocab_size - 1
    assert ends.any(1).all()
    first = np.cumsum(ends, 1) - ends == 0
    nats, words = (found.surprisal * first).sum(1), first.sum(1) - 1
    for values, expected in ((nats, BRACKETS.sentence_entropy), (words, BRACKETS.sentence_length)):
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))


def test_a_hash_is_settled_by_its_seed_and_looks_uniform() -> None:
    found = HashStream().sample(100, 64, seed=0)
    np.testing.assert_allclose(found.surprisal.sum(1), 16 * math.log(2))
    assert found.surprisal[:, 4:].max() == 0
    counts = np.bincount(HashStream().sample(200, 320, seed=0).tokens.ravel(), minlength=256)
    assert ((counts - 250) ** 2 / 250).sum() < 255 + 5 * math.sqrt(2 * 255)  # chi-squared


def test_what_cannot_follow_is_infinitely_surprising_wherever_it_stands() -> None:
    source = HashStream(vocab_size=256, seed_bits=6)
    tokens = source.sample(2, 50, seed=0).tokens
    tokens[1, 40] += 1 if tokens[1, 40] < 255 else -1
    surprisal, _ = source.score(tokens)
    assert np.flatnonzero(np.isinf(surprisal).any(0)).tolist() == [40]
    end = len(ENGLISH.words)
    surprisal, entropy = GrammarSource().score(np.array([[end, 0, 0]]))  # no sentence is empty
    assert surprisal[0].tolist() == [math.inf, 0, 0]
    assert entropy[0, 0] > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Independent(probabilities=(0.5, 0.6)), "sum of 1.1"),
        (lambda: Markov(vocab_size=1000, order=3), "at most"),
        (lambda: Markov(order=0), "order: got 0"),
        (lambda: NoisyCopy(noise=0.0), "noise: got 0"),
        (lambda: HashStream(vocab_size=3), "got 3 tokens"),
        (lambda: Grammar(rules={"S": {"S S": 0.5, "x": 0.5}}), "never end"),
        (lambda: Grammar(rules={"S": {"x": 0.4}}), "sum of 0.4"),
        (lambda: Grammar(rules={"S": {"x y": 1.0}}), "neither two symbols nor one word"),
    ],
)
def test_impossible_sources_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
