"""A probabilistic context-free grammar: sentences, and the exact probability of each next word.

Sentences follow each other, each closed by an end token. The probability of a word given those before it in its
sentence is a ratio of prefix probabilities: that of all sentences which begin so (Jelinek and Lafferty 1991,
"Computation of the probability of initial substring generation by stochastic context-free grammars"; rules in Chomsky
normal form). Left recursion is summed up in closed form, so that no depth is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import ConfigError

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
BATCH = 128  # sentences that are parsed in step


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Rules in Chomsky normal form. A symbol becomes two symbols or one word; sentences grow from the first symbol."""

    rules: Mapping[str, Mapping[str, float]]
    """Symbol -> {right side: probability}; 'NP VP' are two symbols, one that is no symbol is a word."""

    def __post_init__(self) -> None:
        for symbol, sides in self.rules.items():
            if abs(sum(sides.values()) - 1) > 1e-9 or min(sides.values()) <= 0:
                raise ConfigError(
                    f"rules of {symbol}: got a sum of {sum(sides.values()):.6g}", hint="probabilities sum to 1"
                )
            for side in sides:
                parts = side.split()
                if len(parts) not in (1, 2) or (len(parts) == 2) != all(part in self.rules for part in parts):
                    raise ConfigError(f"rule {symbol} -> {side}: got neither two symbols nor one word", hint="split it")
        if np.abs(np.linalg.eigvals(self._offspring)).max() >= 1:
            raise ConfigError("the grammar's sentences never end", hint="lower the probabilities of recursive rules")

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """All symbols, the first of which is the sentence."""
        return tuple(self.rules)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The word of each token; the end token follows them."""
        sides = [side for right in self.rules.values() for side in right]
        return tuple(dict.fromkeys(side for side in sides if " " not in side))

    @cached_property
    def binary(self) -> tuple[Tokens, Tokens, Tokens, Floats]:
        """Rules A -> B C as A, B, C (R,) and their probabilities (R,)."""
        index = {symbol: number for number, symbol in enumerate(self.symbols)}
        rules = [
            (index[symbol], *(index[part] for part in side.split()), p)
            for symbol, right in self.rules.items()
            for side, p in right.items()
            if " " in side
        ]
        parent, left, right, p = zip(*rules, strict=True) if rules else ((), (), (), ())
        return np.array(parent, int), np.array(left, int), np.array(right, int), np.array(p, float)

    @cached_property
    def lexical(self) -> Floats:
        """(N, W) probability that a symbol becomes a word."""
        table = np.zeros((len(self.symbols), len(self.words)))
        for number, right in enumerate(self.rules.values()):
            for side, p in right.items():
                if " " not in side:
                    table[number, self.words.index(side)] = p
        return table

    @property
    def sentence_entropy(self) -> float:
        """Entropy of a derivation in nats; that of a sentence if none has two derivations, else an upper bound."""
        entropy = [-sum(p * np.log(p) for p in right.values()) for right in self.rules.values()]
        return float(self._expected(np.array(entropy))[0])

    @property
    def sentence_length(self) -> float:
        """Expected number of words of a sentence, the end token not counted."""
        return float(self._expected(self.lexical.sum(1))[0])

    def draw(self, rng: np.random.Generator, segments: int, length: int) -> Tokens:
        """Tokens (segments, length): leftmost derivations of all segments in step, each with a stack of symbols."""
        options, chances = self._options
        stack = np.zeros((segments, length + 2), np.int64)
        height, filled = np.ones(segments, np.int64), np.zeros(segments, np.int64)
        tokens = np.empty((segments, length), np.int64)
        while (busy := np.flatnonzero(filled < length)).size:
            ended = busy[height[busy] == 0]
            tokens[ended, filled[ended]] = len(self.words)
            filled[ended] += 1
            stack[ended, 0], height[ended] = 0, 1
            going = busy[filled[busy] < length]
            top = stack[going, height[going] - 1]
            choice = (rng.random(len(going))[:, None] >= chances[top]).sum(1)
            word, left, right = options[top, choice].T
            spoken = going[word >= 0]
            tokens[spoken, filled[spoken]] = word[word >= 0]
            filled[spoken] += 1
            height[spoken] -= 1
            split = going[word < 0]
            if height[split].max(initial=0) == stack.shape[1]:
                stack = np.pad(stack, ((0, 0), (0, length)))
            stack[split, height[split] - 1] = right[word < 0]
            stack[split, height[split]] = left[word < 0]
            height[split] += 1
        return tokens

    def score(self, tokens: Tokens) -> tuple[Floats, Floats]:
        """Surprisal and entropy in nats, both (S, T), of any tokens (S, T); infinite where a word cannot follow.

        Equal sentences are parsed once. Time grows with the cube of the longest sentence; its probability must stay
        above 1e-300.
        """
        sentences, where = _sentences(tokens, len(self.words))
        distinct, which = np.unique(sentences, axis=0, return_inverse=True)
        length = (distinct >= 0).sum(1)
        nexts = np.zeros((len(distinct), distinct.shape[1] + 1, len(self.words) + 1))
        order = np.argsort(length)
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            most = length[rows].max()
            nexts[rows, : most + 1] = self.next_word(np.maximum(distinct[rows, :most], 0))
        p = nexts[which[where[..., 0]], where[..., 1]]
        hit = np.take_along_axis(p, tokens[..., None], -1)[..., 0]
        safe = np.where(p > 0, p, 1)
        dead = np.cumsum(hit <= 0, 1) - (hit <= 0) > 0
        surprisal = np.where(hit > 0, -np.log(np.where(hit > 0, hit, 1)), np.inf)
        return np.where(dead, 0, surprisal), np.where(dead, 0, -(p * np.log(safe)).sum(-1))

    def next_word(self, sentences: Tokens) -> Floats:
        """(M, n + 1, W + 1) probabilities of the word, or the end, after each of the first 0 .. n words.

        sentences (M, n) words. Zeros after a beginning that no sentence has.
        """
        count, length = sentences.shape
        inside = np.zeros((count, length, length, len(self.symbols)))  # [first, last]: P(symbol becomes these words)
        result = np.zeros((count, length + 1, len(self.words) + 1))
        seen = np.ones(count)
        for place in range(length + 1):
            begins = self._prefixes(inside, place)  # (M, W): words 0 .. place - 1, then each word
            whole = inside[:, 0, place - 1, 0] if place else np.zeros(count)
            joint = np.concatenate([begins, whole[:, None]], 1)
            result[:, place] = joint / np.where(seen > 0, seen, np.inf)[:, None]
            if place < length:
                seen = begins[np.arange(count), sentences[:, place]]
                self._extend(inside, sentences[:, place], place)
        return result

    def _extend(self, inside: Floats, word: Tokens, last: int) -> None:
        """Fill in the inside probabilities of all spans that end with word `last` (M,)."""
        _, left, right, _ = self.binary
        inside[:, last, last] = self.lexical[:, word].T
        for first in range(last - 1, -1, -1):
            lefts = inside[:, first, first:last][..., left]
            rights = inside[:, first + 1 : last + 1, last][..., right]
            inside[:, first, last] = np.einsum("mkr,mkr->mr", lefts, rights) @ self._by_parent

    def _prefixes(self, inside: Floats, last: int) -> Floats:
        """P(the sentence is words 0 .. last - 1, then each word, then anything): (M, W)."""
        _, left, right, _ = self.binary
        count, rules, words = len(inside), len(right), len(self.words)
        begins = np.broadcast_to(self._corners @ self.lexical, (count, len(self.symbols), words))
        rights = np.empty((count, rules, last + 1, words))  # the same of each rule's right symbol, from each word on
        for first in range(last - 1, -1, -1):
            rights[:, :, first + 1] = begins[:, right]
            lefts = inside[:, first, first:last][..., left].transpose(0, 2, 1)
            halves = (lefts[:, :, None] @ rights[:, :, first + 1 : last + 1])[:, :, 0]
            begins = self._corners @ (self._by_parent.T @ halves)
        return begins[:, 0]

    @cached_property
    def _by_parent(self) -> Floats:
        """(R, N) the probability of each rule, in the column of the symbol that it rewrites."""
        parent, _, _, p = self.binary
        return np.where(parent[:, None] == np.arange(len(self.symbols)), p[:, None], 0.0)

    @cached_property
    def _corners(self) -> Floats:
        """(N, N) expected number of times that a symbol stands at the left edge below another, itself included."""
        parent, left, _, p = self.binary
        step = np.zeros((len(self.symbols), len(self.symbols)))
        np.add.at(step, (parent, left), p)
        return np.asarray(np.linalg.inv(np.eye(len(step)) - step), np.float64)

    @cached_property
    def _offspring(self) -> Floats:
        """(N, N) expected number of symbols that one symbol becomes in a step."""
        parent, left, right, p = self.binary
        counts = np.zeros((len(self.symbols), len(self.symbols)))
        np.add.at(counts, (parent, left), p)
        np.add.at(counts, (parent, right), p)
        return counts

    def _expected(self, each: Floats) -> Floats:
        """Sum over a whole derivation of a quantity per rewritten symbol (N,), by the symbol it grows from."""
        return np.asarray(np.linalg.solve(np.eye(len(each)) - self._offspring, each), np.float64)

    @cached_property
    def _options(self) -> tuple[Tokens, Floats]:
        """What each symbol can become: (N, O, 3) word or -1, left, right; and (N, O - 1) cumulative chances."""
        rows = [list(self._ways(number)) for number in range(len(self.symbols))]
        most = max(map(len, rows))
        options = np.full((len(rows), most, 3), -1)
        chances = np.ones((len(rows), most - 1))
        for number, ways in enumerate(rows):
            options[number, : len(ways)] = [way for way, _ in ways]
            chances[number, : len(ways) - 1] = np.cumsum([p for _, p in ways])[:-1]
        return options, chances

    def _ways(self, number: int) -> Iterator[tuple[tuple[int, int, int], float]]:
        index = {symbol: place for place, symbol in enumerate(self.symbols)}
        for side, p in self.rules[self.symbols[number]].items():
            parts = side.split()
            if len(parts) == 2:
                yield (-1, index[parts[0]], index[parts[1]]), p
            else:
                yield (self.words.index(side), -1, -1), p


def _sentences(tokens: Tokens, end: int) -> tuple[Tokens, Tokens]:
    """The sentences (M, n) in segments (S, T), padded with -1, and for each token its (sentence, place): (S, T, 2).

    A sentence begins with each segment and after each end token.
    """
    segments, length = tokens.shape
    before = np.zeros((segments, length), np.int64)
    before[:, 1:] = np.cumsum(tokens == end, 1)[:, :-1]
    numbers = before + np.concatenate([[0], np.cumsum(before[:, -1] + 1)[:-1]])[:, None]
    starts = np.ones((segments, length), bool)
    starts[:, 1:] = tokens[:, :-1] == end
    position = np.broadcast_to(np.arange(length), tokens.shape)
    place = position - np.maximum.accumulate(np.where(starts, position, 0), 1)
    sentences = np.full((int(numbers.max()) + 1, int(place.max()) + 1), -1)
    words = tokens != end
    sentences[numbers[words], place[words]] = tokens[words]
    return sentences, np.stack([numbers, place], -1)


ENGLISH = Grammar(
    rules={
        "S": {"NP VP": 1.0},
        "NP": {"D N": 0.5, "NP PP": 0.2, "she": 0.15, "he": 0.15},
        "VP": {"V NP": 0.5, "VP PP": 0.2, "rings": 0.2, "waits": 0.1},
        "PP": {"P NP": 1.0},
        "D": {"the": 0.7, "a": 0.3},
        "N": {"luthier": 0.4, "violin": 0.3, "bow": 0.2, "spruce": 0.1},
        "V": {"planes": 0.5, "tunes": 0.3, "hears": 0.2},
        "P": {"with": 0.6, "in": 0.4},
    }
)
"""Where "with a bow" belongs is open in these sentences: one of them has several derivations."""
