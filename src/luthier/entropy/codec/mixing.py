"""Context mixing in C, or in Python where there is no C compiler: the same bytes either way, 500 times slower."""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import ConfigError
from luthier.core.native import Library, load_library
from luthier.entropy.codec.mixing_reference import ReferenceMixing
from luthier.entropy.codec.tables import Tables, tables

SOURCE = Path(__file__).with_name("mixing.c")
MOST_STREAMS = 32
log = logging.getLogger(__name__)


class Mixing(Protocol):
    """The state of a coder: what it has learned, and the frame that it is in."""

    def reset(self) -> None:
        """Forget everything."""

    def copy(self) -> Mixing:
        """Another state that has learned the same, to begin a frame with."""

    def begin(self, text: bytearray, start: int, size: int, streams: int, shift: int, payload: bytes | None) -> None:
        """Start a frame, text[start : start + size], in 1 to 32 streams; text[:start] is known to both sides.

        `shift` is how far the text moved down since the last frame. `payload` is what to decode into the text; None
        encodes what the text holds.
        """

    def run(self, steps: int, counts: NDArray[np.uint32] | None = None) -> None:
        """Code the next `steps` bytes of every stream; counts [streams, 256] are the network's, for one step."""

    def finish(self) -> bytes | None:
        """The payload; None when it is longer than the text, empty after decoding."""


class _Tables(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in Tables._fields)


class NativeMixing:
    """`Mixing` by the compiled code."""

    def __init__(self, library: ctypes.CDLL, slot_bits: int) -> None:
        self._library, self._tables, self._slot_bits = library, tables(), slot_bits
        pointers = _Tables(*(array.ctypes.data for array in self._tables))
        state = library.mixing_new(ctypes.byref(pointers), slot_bits)
        if not state:
            raise MemoryError(f"context mixing needs {(16 << slot_bits) >> 20} MiB")
        self._state = ctypes.c_void_p(state)
        weakref.finalize(self, library.mixing_free, self._state)

    def reset(self) -> None:
        """Forget everything."""
        self._library.mixing_reset(self._state)

    def copy(self) -> NativeMixing:
        """Another state that has learned the same; see `Mixing`."""
        other = NativeMixing(self._library, self._slot_bits)
        self._library.mixing_copy(other._state, self._state)
        return other

    def begin(self, text: bytearray, start: int, size: int, streams: int, shift: int, payload: bytes | None) -> None:
        """Start a frame; see `Mixing`."""
        self._text = (ctypes.c_uint8 * len(text)).from_buffer(text)
        self._decoding = payload is not None
        self._payload = ctypes.create_string_buffer(size) if payload is None else ctypes.create_string_buffer(payload)
        capacity = size if payload is None else len(payload)
        frame = (self._text, start, size, streams, shift)
        self._library.mixing_begin(self._state, *frame, self._payload, capacity, int(self._decoding))

    def run(self, steps: int, counts: NDArray[np.uint32] | None = None) -> None:
        """Code the next bytes; see `Mixing`."""
        address = None if counts is None else np.ascontiguousarray(counts, np.uint32).ctypes.data
        self._library.mixing_run(self._state, steps, address)

    def finish(self) -> bytes | None:
        """The payload; see `Mixing`."""
        used = 0 if self._decoding else self._library.mixing_finish(self._state)
        payload = None if used < 0 else self._payload.raw[:used]
        del self._text, self._payload  # the text may change its size again
        return payload


def open_mixing(slot_bits: int, *, native: bool | None = None) -> Mixing:
    """A fresh state with 2^slot_bits slots of 16 bytes; compiled unless `native` is False or there is no compiler.

    Raises: ConfigError when `native` is True and there is no compiler.
    """
    library, reason = _library() if native is not False else Library(None, "the reference was asked for")
    if library is not None:
        return NativeMixing(library, slot_bits)
    if native:
        raise ConfigError(f"the compiled coder is not to be had: {reason}", hint="install a C compiler")
    if native is None:
        log.warning("coding in Python, at about 0.5 kB/s instead of hundreds: %s", reason)
    return ReferenceMixing(slot_bits)


@functools.cache
def _library() -> Library:
    found = load_library(SOURCE)
    if found.code is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.code.mixing_new.argtypes, found.code.mixing_new.restype = [pointer, number], pointer
        found.code.mixing_free.argtypes = found.code.mixing_reset.argtypes = [pointer]
        found.code.mixing_copy.argtypes, found.code.mixing_copy.restype = [pointer, pointer], None
        found.code.mixing_begin.argtypes = [pointer, pointer, *[number] * 4, pointer, number, ctypes.c_int]
        found.code.mixing_run.argtypes = [pointer, number, pointer]
        found.code.mixing_finish.argtypes, found.code.mixing_finish.restype = [pointer], number
    return found
