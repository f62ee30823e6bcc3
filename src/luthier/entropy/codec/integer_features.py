"""What the byte-level network is told about the bytes before a position, besides what it attends to: rows of tables.

Five short contexts are hashed, each into a table of its own: the last two, three and four bytes, the letters of the
current word, and these together with the word before. Rows of the tables, and that of the last byte, are added up. The
history before the first byte of a stream consists of newlines.

All of it is arithmetic modulo 2^32, so that numpy, C and torch compute the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEWLINE = 10
MASK = 0xFFFFFFFF
SPREAD = 0x9E3779B1  # 2^32 / golden ratio: the high bits of a product with it depend on all bits of the key
LETTER = 0x2F0B4C47
WORD = 0x85EBCA6B
ORDERS = (2, 3, 4)
NAMES = ("last", *(f"order{n}" for n in ORDERS), "word", "words")  # the tables, in the order in which they are stored


def letter_codes() -> NDArray[np.uint32]:
    """(256) 0 for bytes that end a word, else the code of a letter; capitals and small letters share theirs."""
    codes = np.zeros(256, np.uint32)
    for byte in range(256):
        if 65 <= byte <= 90 or 97 <= byte <= 122:
            codes[byte] = (byte | 32) + 1
        elif byte >= 128:
            codes[byte] = byte + 1
    return codes


LETTERS = letter_codes()


class History(NamedTuple):
    """What has to be remembered of B streams to hash their contexts; each (B) uint32."""

    recent: NDArray[np.uint32]
    """The last four bytes, the newest lowest."""
    word: NDArray[np.uint32]
    """Hash of the letters of the current word; 0 outside words."""
    before: NDArray[np.uint32]
    """Hash of the last finished word."""

    @staticmethod
    def start(streams: int) -> History:
        """Before the first byte: four newlines, no words."""
        recent = np.full(streams, NEWLINE * 0x01010101, np.uint32)
        return History(recent, np.zeros(streams, np.uint32), np.zeros(streams, np.uint32))

    def after(self, last: NDArray[np.uint8]) -> History:
        """The history when these bytes (B) have come."""
        letters = LETTERS[last]
        ended = (letters == 0) & (self.word != 0)
        before = np.where(ended, self.word, self.before)
        word = np.where(letters == 0, np.uint32(0), self.word * np.uint32(LETTER) + letters)
        return History(self.recent << np.uint32(8) | last, word, before)

    def keys(self) -> list[NDArray[np.uint32]]:
        """One key (B) for each hashed table."""
        recent = [self.recent & np.uint32((1 << 8 * order) - 1) for order in ORDERS]
        return [*recent, self.word, self.word * np.uint32(WORD) + self.before]


def hashed(keys: NDArray[np.uint32], bits: int) -> NDArray[np.intp]:
    """Rows of keys in a table of 2^bits rows."""
    return ((keys * np.uint32(SPREAD)) >> np.uint32(32 - bits)).astype(np.intp)
