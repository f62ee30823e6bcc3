"""The compiled coder and its definition in Python: the same bytes, and one decodes the other's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.core.errors import ConfigError
from luthier.entropy.codec.mixing import Mixing, _library, open_mixing
from luthier.entropy.codec.tables import EXACT, MOST, TOP, tables

needs_compiler = pytest.mark.skipif(_library().code is None, reason=_library().reason)
TEXT = b"the cat sat on the mat. The cat sat on the hat? the bat sat on\r\n the cat's hat 1234 \xc3\xa9\xff\0"
SLOTS = 12


def counts(streams: int, step: int) -> NDArray[np.uint32]:
    """Of a network that knows nothing, and is very sure of it."""
    draw = np.random.default_rng(step)
    return draw.integers(1, 1 << 32, (streams, 256), np.uint32) >> draw.integers(0, 31, (streams, 256), np.uint32) | 1


def code(
    frames: list[bytes], streams: int, *, network: bool, native: bool, payloads: list[bytes] | None
) -> list[bytes]:
    """Payloads of the frames, or the frames of the payloads, by one state."""
    mixing, before, shift, results = open_mixing(SLOTS, native=native), b"", 0, list[bytes]()
    for number, frame in enumerate(frames):
        text = bytearray(before + (frame if payloads is None else bytes(len(frame))))
        mixing.begin(text, len(before), len(frame), streams, shift, None if payloads is None else payloads[number])
        steps = -(-len(frame) // streams)
        if network:
            for step in range(steps):
                mixing.run(1, counts(streams, step))
        else:
            mixing.run(steps)
        payload = mixing.finish()
        assert payload is not None
        results.append(payload if payloads is None else bytes(text[len(before) :]))
        before, shift = frame, len(before)
    return results


@needs_compiler
@pytest.mark.parametrize(("streams", "network"), [(1, False), (3, False), (2, True)])
def test_the_definition_gives_the_same_bytes(streams: int, network: bool) -> None:
    frames = [TEXT + TEXT[:20], TEXT[5:40]]
    fast = code(frames, streams, network=network, native=True, payloads=None)
    assert fast == code(frames, streams, network=network, native=False, payloads=None)
    assert frames == code(frames, streams, network=network, native=False, payloads=fast)


@needs_compiler
@pytest.mark.parametrize("streams", [1, 2, 7, 32])
@pytest.mark.parametrize("network", [False, True])
def test_it_decodes_what_it_encoded(streams: int, network: bool) -> None:
    frames = [TEXT * 20, TEXT[:1], TEXT[::-1] * 3, b"\0" * 999]
    payloads = code(frames, streams, network=network, native=True, payloads=None)
    assert frames == code(frames, streams, network=network, native=True, payloads=payloads)


@needs_compiler
def test_a_frame_is_cheaper_after_another_like_it() -> None:
    first, second = code([TEXT * 4, TEXT * 4], 1, network=False, native=True, payloads=None)
    assert len(second) < len(first) / 4


@needs_compiler
@pytest.mark.parametrize("native", [True, False])
def test_a_copy_goes_on_alike_and_apart(native: bool) -> None:
    def run(mixing: Mixing, before: bytes, text: bytes) -> bytes | None:
        mixing.begin(bytearray(before + text), len(before), len(text), 1, 0, None)
        mixing.run(len(text))
        return mixing.finish()

    size = 400 if native else 60
    first, other, last = (TEXT * 5)[:size], (TEXT[::-1] * 5)[:size], (TEXT * 4)[7 : size // 2]
    straight, copied = open_mixing(SLOTS, native=native), open_mixing(SLOTS, native=native)
    assert run(straight, b"", first) == run(copied, b"", first)
    copy = copied.copy()
    run(copied, first, other)  # what one learns, the other does not
    wanted = run(straight, first, last)
    assert run(copy, first, last) == wanted
    assert run(copied, first, last) != wanted
    del copied
    copy.reset()
    assert run(copy, b"", first) == run(open_mixing(SLOTS, native=native), b"", first)


@needs_compiler
def test_a_network_that_knows_the_text_makes_it_free() -> None:
    """Also when every eighth guess is wrong, which the mixer must find out."""
    text = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    mixing = open_mixing(SLOTS, native=True)
    mixing.begin(bytearray(text), 0, len(text), 1, 0, None)
    for step, byte in enumerate(text):
        guess = np.ones((1, 256), np.uint32)
        guess[0, (byte + (step % 8 == 0)) % 256] = 100_000
        mixing.run(1, guess)
    payload = mixing.finish()
    assert payload is not None
    assert len(payload) < len(text) * (1 / 8 + 0.15)


@needs_compiler
def test_random_bytes_overflow_and_are_refused() -> None:
    text = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    mixing = open_mixing(SLOTS, native=True)
    mixing.begin(bytearray(text), 0, len(text), 1, 0, None)
    mixing.run(len(text))
    assert mixing.finish() is None


def test_tables_are_what_they_are_said_to_be() -> None:
    """And the same on every machine: a file made with others cannot be read."""
    made = tables()
    logits = np.arange(-TOP - 1, TOP + 1) / 256
    assert np.abs(made.squash - 65536 / (1 + np.exp(-logits))).max() <= 1
    probabilities = (np.arange(4096) + 0.5) / 4096
    wanted = np.clip(np.log(probabilities / (1 - probabilities)) * 256, -2130, 2130)
    middle = slice(64, 4032)  # further out, one step of the 16-bit probability is many logits
    assert np.abs(made.stretch - wanted)[middle].max() <= 3
    digests = [zlib.crc32(array.astype("<i8").tobytes()) for array in made]
    assert hashlib.sha256(repr(digests).encode()).hexdigest()[:16] == "1b013072f9bd47e1"


def test_histories_count_and_forget() -> None:
    following = tables().next
    state = 0
    for _ in range(500):
        state = following[state][0]
    assert following[state][0] == state  # as many zeros as it can count
    assert following[state][1] != state
    assert len({tuple(row) for row in following[:200].tolist()}) > 100
    assert max(MOST.values()) > EXACT


def test_no_compiler_is_told(tmp_path: object) -> None:
    code_ = (
        "import logging; logging.basicConfig()\nfrom luthier.entropy.codec.mixing import open_mixing\n"
        "print(type(open_mixing(12)).__name__)"
    )
    environment = {"LUTHIER_NATIVE": "0", "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code_], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ReferenceMixing"
    assert "coding in Python" in done.stderr
    assert "turned off by LUTHIER_NATIVE=0" in done.stderr


def test_asking_for_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.core.native import Library

    monkeypatch.setattr("luthier.entropy.codec.mixing._library", lambda: Library(None, "no C compiler found"))
    with pytest.raises(ConfigError, match="no C compiler found"):
        open_mixing(SLOTS, native=True)
