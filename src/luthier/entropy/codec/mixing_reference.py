"""Context mixing, slowly: the definition of what `mixing.c` computes, and what runs where there is no C compiler.

Every bit is predicted by the histories of eleven contexts (the last 1 to 6 and 8 bytes, words, a gap), by the two
lowest orders directly, by what followed the last occurrence of the last six bytes, and by a network if there is one.
Mixers weigh the logits; each of seven is chosen by some context among many, and a last one weighs their outputs. Two
curves refine the result. All parts learn from every bit, and all arithmetic is on integers.

Streams are coded in turn, a byte of each at a time. They learn into the same tables.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.entropy.codec.range_coder import Decoder, Encoder
from luthier.entropy.codec.tables import CONTEXTS, INPUTS, TOP, tables

WORD = 0xFFFFFFFF
SHORTEST, LONGEST, MATCH_BITS, MOST_WEIGHT = 6, 60, 20, 524287
SIZES = (256, 264, 2048, 64, 512, 2048, 25)
FIRST_ROWS = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
A, B, C = 0x2F0B4C47, 0x3D4D51CB, 0x9E3779B1
ORDER0, ORDER1, MATCH, MATCH_SIZE, BIAS, NETWORK, REFINED = range(22, 29)

Curve = NDArray[np.int64]


def mixed(value: int) -> int:
    """A 32-bit hash."""
    value = value * 0x85EBCA6B & WORD
    value ^= value >> 15
    value = value * 0xC2B2AE35 & WORD
    return value ^ value >> 13


@dataclass
class Stream:
    """Where one piece of the text stands, and the contexts that it is in."""

    position: int
    end: int
    first: int
    pointer: int = 0
    length: int = 0
    recent: int = 0
    older: int = 0
    word: int = 0
    word1: int = 0
    word2: int = 0

    def hashes(self) -> list[int]:
        """One number for each context."""
        c, byte = self.recent, self.recent & 255
        contexts = (
            byte,
            c & 0xFFFF,
            c & 0xFFFFFF,
            c,
            c * A + (self.older & 0xFF),
            c * A + (self.older & 0xFFFF) * 3,
            self.word * 0x01000193 + byte,
            self.word * A + self.word1 * B + byte,
            (c & 0xFFFF00) * A,
            (c * A & WORD) ^ (self.older * B & WORD),
            self.word * A + self.word1 * B + self.word2 * 0x7F4A7C15,
        )
        return [mixed(context + i * 0x632BE5AB & WORD) for i, context in enumerate(contexts)]

    def advance(self, byte: int, letter: int) -> None:
        """Go past a byte; `letter` is its lower case, or 0 outside words."""
        self.position += 1
        self.older = (self.older << 8 | self.recent >> 24) & WORD
        self.recent = (self.recent << 8 | byte) & WORD
        if self.length:
            self.pointer += 1
            self.length = min(self.length + 1, LONGEST)
        if letter:
            self.word = (self.word + letter + 1) * A & WORD
            self.word ^= self.word >> 15
        elif self.word:
            self.word, self.word1, self.word2 = 0, self.word, self.word1


class ReferenceMixing:
    """The state of a coder between frames; `copy`, `begin`, `run` and `finish` are those of `mixing.Mixing`."""

    def __init__(self, slot_bits: int) -> None:
        self.slot_mask = (1 << slot_bits) - 1
        self.t = tables()
        self.stretch, self.squash = self.t.stretch.tolist(), self.t.squash.tolist()
        self.reciprocal, self.next = self.t.reciprocal.tolist(), self.t.next.tolist()
        self.kinds, self.letters = self.t.kinds.tolist(), self.t.letters.tolist()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lines: dict[int, list[bytearray]] = defaultdict(lambda: [bytearray(16) for _ in range(4)])
        self.positions: dict[int, int] = {}
        self.histories = [self.t.histories.tolist() for _ in range(CONTEXTS)]
        self.matches = self.t.matches.tolist()
        self.order0, self.order1 = [1 << 31] * 256, [1 << 31] * 65536
        self.refined = [self._squashed(i // 8 * 36 - 2286) << 16 for i in range(1024)]
        self.weights = np.tile(self.t.weights.astype(np.int64), (sum(SIZES), 1))
        self.last = np.tile(np.array([65536 // 7] * 7 + [0], np.int64), (256, 1))
        curve = np.array([self._squashed((k - 16) * 128) for k in range(33)], np.int64)
        self.curve0: defaultdict[int, Curve] = defaultdict(curve.copy)
        self.curve2: defaultdict[int, Curve] = defaultdict(curve.copy)

    def copy(self) -> ReferenceMixing:
        """Another state that has learned the same."""
        return copy.deepcopy(self)

    def begin(self, text: bytearray, start: int, size: int, streams: int, shift: int, payload: bytes | None) -> None:
        """Start a frame of `size` bytes at text[start]; `payload` is what to decode, None to encode."""
        self.text, self.start, self.each = text, start, -(-size // streams)
        self.positions = {key: place - shift for key, place in self.positions.items() if place > shift}
        self.coder: Encoder | Decoder = Encoder() if payload is None else Decoder(payload)
        firsts = [start + min(i * self.each, size) for i in range(streams)]
        self.streams = [Stream(a, min(a + self.each, start + size), a) for a in firsts]

    def run(self, steps: int, counts: NDArray[np.uint32] | None = None) -> None:
        """Code the next bytes of every stream; counts [streams, 256] are the network's, for one step."""
        for _ in range(steps):
            for number, stream in enumerate(self.streams):
                if stream.position < stream.end:
                    byte = self._code_byte(stream, None if counts is None else counts[number])
                    self.text[stream.position] = byte
                    stream.advance(byte, self.letters[byte])

    def finish(self) -> bytes:
        """The payload of an encoded frame, nothing of a decoded one."""
        return self.coder.finish() if isinstance(self.coder, Encoder) else b""

    def _code_byte(self, stream: Stream, counts: NDArray[np.uint32] | None) -> int:
        tree = None if counts is None else _tree(counts)
        hashes = stream.hashes()
        slots = [self._find(value) for value in hashes]
        self._find_match(stream)
        expected = self.text[stream.pointer] | 256 if stream.length else 0
        wanted = self.text[stream.position]
        node = 1
        for place in range(8):
            if place == 4:
                slots = [self._find(mixed(value ^ (node * C & WORD))) for value in hashes]
            in_nibble = node if place < 4 else node & ((1 << (place - 4)) - 1) | 1 << (place - 4)
            match = -1
            if stream.length and expected >> (8 - place) == node:
                size = stream.length if stream.length < 16 else 16 + ((stream.length - 16) >> 2)
                match = 2 * size + (expected >> (7 - place) & 1)
            nodes = [(slot, in_nibble) for slot in slots]
            bit = self._code_bit(stream, nodes, node, place, match, tree, wanted >> (7 - place) & 1)
            node = 2 * node + bit
        return node & 255

    def _code_bit(
        self,
        stream: Stream,
        nodes: list[tuple[bytearray, int]],
        node: int,
        place: int,
        match: int,
        tree: list[int] | None,
        wanted: int,
    ) -> int:
        byte1, byte2 = stream.recent & 255, stream.recent >> 8 & 255
        inputs, seen, refined = self._inputs(nodes, node, byte1, match, tree)
        doubt = 0 if tree is None else 1 + (int(inputs[NETWORK]) + 2304) // 192
        kinds = self.kinds[byte1] * 8 + self.kinds[byte2]
        sets = (node, (0 if match < 0 else 1 + match // 2) * 8 + place, byte1 * 8 + place)
        rows = FIRST_ROWS + np.array((*sets, seen * 8 + place, kinds * 8 + place, byte2 * 8 + place, doubt))
        outputs = np.zeros(8, np.int64)
        outputs[:7] = _dot(self.weights[rows], inputs)
        logit = int(_dot(self.last[node], outputs))
        p = self._squashed(logit)
        curves = self.curve0[node], self.curve2[mixed((stream.recent & 0xFFFF) * 256 + node) >> 16]
        at = min(max(logit + 2048, 0), 4095)
        point, near = at >> 7, at & 127
        bent = [int(curve[point] * (128 - near) + curve[point + 1] * near) >> 7 for curve in curves]
        bit = self.coder.code(wanted, min(max((2 * p + sum(bent) + 2) >> 2, 1), 65535))
        errors = [((bit << 16) - self._squashed(int(output))) * 14 >> 6 for output in outputs[:7]]
        self.weights[rows] = _trained(self.weights[rows], inputs, np.array(errors)[:, None])
        self.last[node] = _trained(self.last[node], outputs, np.array(((bit << 16) - p) >> 3))
        for curve in curves:
            curve[point : point + 2] += (65535 * bit - curve[point : point + 2]) >> 6
        self._learn_all(nodes, node, byte1, match, refined, bit)
        if match >= 0 and match & 1 != bit:
            stream.length = 0
        return bit

    def _inputs(
        self, nodes: list[tuple[bytearray, int]], node: int, byte1: int, match: int, tree: list[int] | None
    ) -> tuple[NDArray[np.int64], int, int]:
        """Logits [32], how many contexts have been seen, and which refinement of the network applies (or -1)."""
        inputs, seen, refined = [0] * INPUTS, 0, -1
        for i, (slot, place) in enumerate(nodes):
            if slot[place]:
                p12 = self.histories[i][slot[place]] >> 20
                inputs[2 * i], inputs[2 * i + 1] = self.stretch[p12], p12 - 2048
                seen += i < 6 or i == 9
        inputs[ORDER0] = self.stretch[self.order0[node] >> 20]
        inputs[ORDER1] = self.stretch[self.order1[byte1 << 8 | node] >> 20]
        inputs[BIAS] = 256
        if match >= 0:
            p12 = self.matches[match] >> 20
            inputs[MATCH], inputs[MATCH_SIZE] = self.stretch[p12], p12 - 2048
        if tree is not None:
            p12 = tree[2 * node + 1] * 4095 // tree[node] if tree[node] else 2048
            inputs[NETWORK] = self.stretch[p12]
            refined = (inputs[NETWORK] + 2304) // 36 * 8 + seen
            inputs[REFINED] = self.stretch[self.refined[refined] >> 20]
        return np.array(inputs, np.int64), seen, refined

    def _learn_all(
        self, nodes: list[tuple[bytearray, int]], node: int, byte1: int, match: int, refined: int, bit: int
    ) -> None:
        for i, (slot, place) in enumerate(nodes):
            self._learn(self.histories[i], slot[place], bit, 1023)
            slot[place] = self.next[slot[place]][bit]
        self._learn(self.order0, node, bit, 255)
        self._learn(self.order1, byte1 << 8 | node, bit, 255)
        if refined >= 0:
            self._learn(self.refined, refined, bit, 1023)
        if match >= 0:
            self._learn(self.matches, match, bit, 1023)

    def _learn(self, entries: list[int], index: int, bit: int, most: int) -> None:
        p, visits = entries[index] >> 10, entries[index] & 1023
        p += ((bit << 22) - p) * self.reciprocal[visits] >> 16
        entries[index] = p << 10 | min(visits + 1, max(most, visits))

    def _find(self, value: int) -> bytearray:
        """The slot of a context; a missing one replaces the least used of its line."""
        check = value >> 24 or 1
        line = self.lines[(value * C & WORD) & self.slot_mask & ~3]
        order = [line[(value >> 20) + k & 3] for k in range(4)]
        for slot in order:
            if slot[0] == check:
                return slot
        worst = min(order, key=lambda slot: slot[1])
        worst[:] = bytes([check]) + bytes(15)
        return worst

    def _find_match(self, stream: Stream) -> None:
        key = mixed(stream.recent * A & WORD ^ (stream.older & 0xFFFF) * B & WORD) >> (32 - MATCH_BITS)
        if stream.length and not self._known(stream.pointer):
            stream.length = 0
        if stream.position - stream.first < SHORTEST:
            return
        found = self.positions.get(key, 0)
        self.positions[key] = stream.position
        if stream.length or not found or not self._known(found):
            return
        first = 0 if found < self.start else self.start + (found - self.start) // self.each * self.each
        most, length = min(LONGEST, found - first, stream.position - stream.first), 0
        while length < most and self.text[stream.position - 1 - length] == self.text[found - 1 - length]:
            length += 1
        stream.length, stream.pointer = length if length >= SHORTEST else 0, found

    def _known(self, position: int) -> bool:
        number = (position - self.start) // self.each
        return number < 0 or (number < len(self.streams) and position < self.streams[number].position)

    def _squashed(self, logit: int) -> int:
        return self.squash[min(max(logit, -TOP - 1), TOP) + TOP + 1]


def _dot(weights: NDArray[np.int64], inputs: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.clip(((weights * inputs) >> 8).sum(-1) >> 8, -TOP - 1, TOP)


def _trained(weights: NDArray[np.int64], inputs: NDArray[np.int64], error: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.clip(weights + ((inputs * error + 32768) >> 16), -MOST_WEIGHT, MOST_WEIGHT)


def _tree(counts: NDArray[np.uint32]) -> list[int]:
    """Sums of counts below every node: node 1 is the root, node n has the children 2n and 2n + 1."""
    tree = [0] * 256 + counts.tolist()
    for node in range(255, 0, -1):
        tree[node] = tree[2 * node] + tree[2 * node + 1]
    return tree
