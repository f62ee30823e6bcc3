"""The .lut file: round trips of anything, and an error for whatever is damaged."""

from __future__ import annotations

import bz2
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.entropy.codec import container, frames
from luthier.entropy.codec.container import Summary, compress, decompress, read_summary
from luthier.entropy.codec.frames import FrameCoder, Network
from luthier.entropy.codec.integer_network import IntegerNetwork
from luthier.entropy.codec.mixing import _library
from luthier.entropy.codec.segment_code import Code

pytestmark = pytest.mark.skipif(_library().code is None, reason=_library().reason)
GOLDEN = Path(__file__).with_name("golden.lut")
GOLDEN_TEXT = b"".join(b"%d bottles of beer on the wall, %d bottles of beer. \xff\0\r\n" % (n, n) for n in range(20))


class Counting:
    """A network that knows how often each byte came in its stream; it stands for the real one."""

    sha256 = "ab" * 32
    dims = levels = 0

    def open(self, streams: int, code: Code = (), /) -> NDArray[np.uint32]:
        return np.ones((streams, 256), np.uint32)

    def probabilities(self, state: NDArray[np.uint32], /) -> NDArray[np.uint32]:
        return state

    def advance(self, state: NDArray[np.uint32], data: NDArray[np.uint8], /) -> None:
        state[np.arange(len(data)), data] += 32


def no_network(sha256: str) -> Network:
    raise DataError(f"needs {sha256}", hint="-")


def counting(sha256: str) -> Network:
    assert sha256 == Counting.sha256
    return Counting()


def packed(data: bytes, **settings_: Any) -> bytes:
    target = io.BytesIO()
    compress(io.BytesIO(data), target, **{"size": len(data), **settings_})
    return target.getvalue()


def unpacked(file: bytes, find_network: Any = no_network) -> bytes:
    target = io.BytesIO()
    decompress(io.BytesIO(file), target, find_network=find_network)
    return target.getvalue()


@settings(max_examples=15, deadline=None)
@given(st.binary(max_size=600) | st.text(max_size=300).map(str.encode), st.booleans())
@example(b"", True)
@example(b"x", False)
@example(b"\0" * 5000, True)
@example(b"\xff\xfe\xc3", True)
@example(os.urandom(3000), True)
@example(bz2.compress(b"already compressed" * 100), True)
def test_any_bytes_come_back(data: bytes, known: bool) -> None:
    file = packed(data, size=len(data) if known else None, verify=False)
    assert unpacked(file) == data
    assert len(file) <= len(data) + 77 + 14


@pytest.mark.parametrize("known", [True, False])
def test_frames_build_on_each_other(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "FRAME_BYTES", 1000)
    data = GOLDEN_TEXT * 3 + os.urandom(2500) + GOLDEN_TEXT
    file = packed(data, size=len(data) if known else None)
    assert unpacked(file) == data
    kinds = [kind for kind, _, _ in read_summary(io.BytesIO(file)).frames]
    assert kinds[0] == kinds[-1] == "mixed"
    assert "raw" in kinds


def test_zeros_cost_nearly_nothing() -> None:
    data = bytes(1 << 17)
    file = packed(data, verify=False)
    assert len(file) < 150
    assert unpacked(file) == data


@pytest.mark.parametrize("size", [0, 1, 100, 3001])
def test_a_network_takes_part(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "SHORT_STREAM", 700)
    data = (GOLDEN_TEXT * 3)[:size]
    file = packed(data, network=Counting())
    assert unpacked(file, counting) == data
    assert read_summary(io.BytesIO(file)).header.model == Counting.sha256
    with pytest.raises(DataError, match="needs abab"):
        unpacked(file)


def test_every_damaged_byte_is_told() -> None:
    file = packed(GOLDEN_TEXT[:90] + os.urandom(20))
    for place in range(len(file)):
        damaged = bytearray(file)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DataError) as caught:
            unpacked(bytes(damaged))
        assert caught.value.hint


def test_every_truncation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "FRAME_BYTES", 64)
    file = packed(GOLDEN_TEXT[:150], verify=False)
    for size in range(len(file)):
        with pytest.raises(DataError, match=r"the file ends at byte|not a \.lut"):
            unpacked(file[:size])
        with pytest.raises(DataError):
            read_summary(io.BytesIO(file[:size]))
    with pytest.raises(DataError, match=f"bytes follow the end of the file, at byte {len(file)}"):
        unpacked(file + b"x")


def test_the_place_of_the_damage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "FRAME_BYTES", 200)
    file = bytearray(packed(GOLDEN_TEXT[:600], verify=False))
    _, _, first = read_summary(io.BytesIO(bytes(file))).frames[0]
    header, fields, check = 16, 4 + (first > 127), 4
    start = header + fields + first + check
    file[start + 6] ^= 1
    with pytest.raises(DataError, match=rf"frame 1 at byte {start}: its checksum differs"):
        unpacked(bytes(file))


def test_swapped_frames_are_told() -> None:
    one, other = packed(b"a" * 90 + os.urandom(10)), packed(b"a" * 90 + os.urandom(10))
    assert one != other
    with pytest.raises(DataError):
        unpacked(one[:40] + other[40:])


def test_what_does_not_come_back_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that fails once: the frame is stored, and the next ones are coded as if nothing had been before."""
    monkeypatch.setattr(container, "FRAME_BYTES", 400)
    decode, calls = FrameCoder.decode, list[int]()

    def failing(self: FrameCoder, frame: frames.Frame, *rest: Any) -> bytes:
        calls.append(1)
        return decode(self, frame, *rest) if len(calls) != 2 else b""

    monkeypatch.setattr(FrameCoder, "decode", failing)
    file = packed(GOLDEN_TEXT[:1000])
    assert [kind for kind, _, _ in read_summary(io.BytesIO(file)).frames] == ["mixed", "raw", "mixed"]
    assert unpacked(file) == GOLDEN_TEXT[:1000]


def test_a_changed_input_is_told() -> None:
    with pytest.raises(DataError, match="has 5 bytes, expected 4"):
        packed(b"12345", size=4)


def test_the_summary_is_the_same_from_everywhere() -> None:
    target = io.BytesIO()
    made = compress(io.BytesIO(GOLDEN_TEXT), target, size=len(GOLDEN_TEXT))
    target.seek(0)
    assert made == decompress(target, None, find_network=no_network) == read_summary(target)
    assert made.compressed == len(target.getvalue())
    assert isinstance(made, Summary)
    assert made.bits_per_byte == 8 * made.compressed / len(GOLDEN_TEXT)


def test_unknown_versions_are_refused() -> None:
    file = bytearray(packed(b"text"))
    file[4] = 9
    with pytest.raises(DataError, match="version 9 of the format, expected 1"):
        unpacked(bytes(file))
    with pytest.raises(DataError, match=r"not a \.lut file"):
        unpacked(b"PK\3\4" + bytes(60))


def test_an_older_file_is_decoded() -> None:
    """golden.lut was written by the first version of the format; it must never be written anew."""
    assert unpacked(GOLDEN.read_bytes()) == GOLDEN_TEXT


def test_an_older_file_with_a_network_is_decoded_and_made_again() -> None:
    """golden_with_network.lut was written before there were segment codes."""
    file = GOLDEN.with_name("golden_with_network.lut").read_bytes()
    network = IntegerNetwork.load(GOLDEN.with_name("golden_network.bin"))
    assert unpacked(file, lambda sha256: network) == GOLDEN_TEXT
    assert packed(GOLDEN_TEXT, network=network) == file


def test_another_process_decodes_it() -> None:
    code = (
        "import io, sys\nfrom luthier.entropy.codec.container import decompress\n"
        "decompress(sys.stdin.buffer, sys.stdout.buffer, find_network=None)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=packed(GOLDEN_TEXT), capture_output=True, check=True)
    assert done.stdout == GOLDEN_TEXT
