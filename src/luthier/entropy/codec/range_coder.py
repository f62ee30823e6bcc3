"""A range coder of bits whose probabilities are 16-bit integers, with carry: the slow form of what `mixing.c` does.

An interval [low, low + range) of 32-bit numbers is cut in proportion to the two probabilities for every bit. Leading
bytes that are certain are written; a carry into them runs back through what was written. The range stays above 2^24, so
that rounding costs little even where the probability is 1 / 65536, and the end of a message costs at most two bytes.
"""

from __future__ import annotations

FULL = (1 << 32) - 1
SMALL = 1 << 24


class Encoder:
    """Bits in, bytes out."""

    def __init__(self) -> None:
        self.low, self.range = 0, FULL
        self.payload = bytearray()

    def code(self, bit: int, p16: int) -> int:
        """Write a bit whose probability of being one is p16 / 65536, 1 to 65535; returns the bit."""
        bound = (self.range * p16) >> 16
        if bit:
            self.range = bound
        else:
            self.low += bound
            self.range -= bound
        self._carry()
        while self.range < SMALL:
            self.payload.append(self.low >> 24)
            self.low = (self.low << 8) & FULL
            self.range <<= 8
        return bit

    def finish(self) -> bytes:
        """The whole message. The decoder takes what follows it for zeros."""
        self.low += SMALL - 1
        self._carry()
        self.payload.append(self.low >> 24)
        return bytes(self.payload)

    def _carry(self) -> None:
        if self.low > FULL:
            self.low &= FULL
            place = len(self.payload) - 1
            while place >= 0 and self.payload[place] == 255:
                self.payload[place] = 0
                place -= 1
            self.payload[place] += 1


class Decoder:
    """Bytes in, bits out."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.place, self.range = payload, 4, FULL
        self.value = int.from_bytes(payload[:4].ljust(4, b"\0"), "big")

    def code(self, bit: int, p16: int) -> int:
        """Read a bit whose probability of being one is p16 / 65536; the argument `bit` is not looked at."""
        bound = (self.range * p16) >> 16
        bit = int(self.value < bound)
        if bit:
            self.range = bound
        else:
            self.value -= bound
            self.range -= bound
        while self.range < SMALL:
            self.range <<= 8
            self.value = self.value << 8 | (self.payload[self.place] if self.place < len(self.payload) else 0)
            self.place += 1
        return bit
