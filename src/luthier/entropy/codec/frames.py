"""Frames: pieces of the input that are coded one after the other, each checked.

What was learned carries over from a mixed frame to the next, and the text of the last frame can still be referred to,
so frames are decoded in order. A raw frame holds its bytes as they are, and makes both sides forget everything.

A mixed frame is cut into streams of equal length, which are coded in lockstep, so that a network reads them as one
batch. Without a network, one stream is best.

A network may be told a code of the whole frame (`segment_code`), which then stands in the frame. Where the search finds
a code that promises to help, the frame is encoded without it and with it, and the shorter one is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.entropy.codec.mixing import Mixing, open_mixing
from luthier.entropy.codec.segment_code import Code, code_of, find_code, number_of, varint_bytes

RAW, MIXED = 0, 1
FRAME_BYTES = 4 << 20
CHUNK = 1 << 16  # bytes between two reports of progress
SHORT_STREAM = 64 << 10  # with a network, a stream is not shorter than this
NETWORK_STREAMS = 16


class Network(Protocol):
    """A byte-level network whose probabilities are integers, the same on every machine.

    It may be conditioned on a code of the whole segment (EEM).
    """

    @property
    def sha256(self) -> str:
        """Hexadecimal digest that names the network in a file."""

    @property
    def dims(self) -> int:
        """Dimensions of its segment codes; 0 when it knows none."""

    @property
    def levels(self) -> int:
        """Levels of each dimension."""

    def open(self, streams: int, code: Code = (), /) -> Any:
        """The state of some streams at their beginning; the code holds for all of them."""

    def probabilities(self, state: Any, /) -> NDArray[np.uint32]:
        """Counts [streams, 256] of the next byte, each at least 1, of any total."""

    def advance(self, state: Any, data: NDArray[np.uint8], /) -> None:
        """Read the next byte [streams] of every stream; of a stream that has ended, a zero."""


class Progress(Protocol):
    """Called with the number of bytes that were coded since the last call."""

    def __call__(self, size: int) -> object: ...


class _Half:
    """Progress of one of two runs over the same bytes."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.left = progress, 0

    def __call__(self, size: int) -> None:
        whole, self.left = divmod(self.left + size, 2)
        self.progress(whole)


class Frame(NamedTuple):
    """One frame as it stands in a file. `code` is the number of a segment code, 0 for none."""

    kind: int
    size: int
    streams: int
    payload: bytes
    code: int = 0

    @property
    def cost(self) -> int:
        """Bytes of payload and code."""
        return len(self.payload) + (varint_bytes(self.code) if self.code else 0)


def slot_bits(size: int | None) -> int:
    """Logarithm of the number of slots (16 bytes each) for an input of some size in bytes, None when unknown."""
    return 22 if size is None else min(22, max(12, (8 * size).bit_length()))


class FrameCoder:
    """One direction of coding: encodes frames, or decodes them in the same order."""

    def __init__(self, slots: int, network: Network | None = None, *, native: bool | None = None) -> None:
        self.mixing: Mixing = open_mixing(slots, native=native)
        self.network = network
        self._before = b""  # the frame before, to which matches may point
        self._shift = 0

    def encode(self, data: bytes, progress: Progress = lambda size: None) -> Frame:
        """A mixed frame, or a raw one when that is not longer. `data` has 1 to 2^31 bytes."""
        code = find_code(self.network, data) if self.network is not None else ()
        frame = self._shorter(data, code, progress) if code else self._mixed(data, (), progress)
        if frame is None or frame.cost >= len(data):
            return self.store(data)
        self._keep(data)
        return frame

    def _shorter(self, data: bytes, code: Code, progress: Progress) -> Frame | None:
        """The frame without the code or the one with it; the mixing goes on from the one that it gives."""
        half, without = _Half(progress), self.mixing
        self.mixing = without.copy()
        coded = self._mixed(data, code, half)
        with_code, self.mixing = self.mixing, without
        plain = self._mixed(data, (), half)
        if plain is not None and (coded is None or plain.cost <= coded.cost):
            return plain
        self.mixing = with_code
        return coded

    def _mixed(self, data: bytes, code: Code, progress: Progress) -> Frame | None:
        """A frame under a code; None when it is longer than the data."""
        streams = self._streams(len(data))
        payload = self._run(bytearray(self._before + data), len(data), streams, code, None, progress)
        number = number_of(code, self.network.levels) if self.network is not None and code else 0
        return None if payload is None else Frame(MIXED, len(data), streams, payload, number)

    def store(self, data: bytes) -> Frame:
        """A raw frame."""
        self._forget()
        return Frame(RAW, len(data), 0, data)

    def decode(self, frame: Frame, progress: Progress = lambda size: None) -> bytes:
        """The bytes of a frame; wrong ones when it is damaged, which the caller's checksum tells."""
        if frame.kind == RAW:
            self._forget()
            progress(frame.size)
            return frame.payload
        text = bytearray(self._before + bytes(frame.size))
        code = code_of(frame.code, self.network.levels) if self.network is not None else ()
        self._run(text, frame.size, frame.streams, code, frame.payload, progress)
        data = bytes(text[len(self._before) :])
        self._keep(data)
        return data

    def _run(
        self, text: bytearray, size: int, streams: int, code: Code, payload: bytes | None, progress: Progress
    ) -> bytes | None:
        start, steps = len(self._before), -(-size // streams)
        self.mixing.begin(text, start, size, streams, self._shift, payload)
        if self.network is None:
            chunk = max(1, CHUNK // streams)
            for first in range(0, steps, chunk):
                self.mixing.run(min(chunk, steps - first))
                progress(min(chunk, steps - first) * streams)
        else:
            self._run_with_network(self.network, code, text, start, steps, streams, progress)
        return self.mixing.finish()

    def _run_with_network(
        self, network: Network, code: Code, text: bytearray, start: int, steps: int, streams: int, progress: Progress
    ) -> None:
        state = network.open(streams, code)
        view = np.frombuffer(text, np.uint8)[start:]
        firsts = np.arange(streams) * steps
        for step in range(steps):
            self.mixing.run(1, network.probabilities(state))
            places = firsts + step
            coded = np.where(places < len(view), view[np.minimum(places, len(view) - 1)], 0).astype(np.uint8)
            network.advance(state, coded)
            progress(streams)

    def _streams(self, size: int) -> int:
        return 1 if self.network is None else max(1, min(NETWORK_STREAMS, size // SHORT_STREAM))

    def _keep(self, data: bytes) -> None:
        self._shift, self._before = len(self._before), data

    def _forget(self) -> None:
        self.mixing.reset()
        self._before, self._shift = b"", 0
