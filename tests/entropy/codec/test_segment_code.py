"""Codes of a frame: their numbers, the search, a frame that one makes shorter and one that it does not, damage."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.entropy.codec import container, frames
from luthier.entropy.codec.byte_config import ByteModelConfig
from luthier.entropy.codec.byte_model import ByteModel
from luthier.entropy.codec.container import compress, decompress, read_summary
from luthier.entropy.codec.frames import MIXED, FrameCoder, Network
from luthier.entropy.codec.integer_network import IntegerNetwork
from luthier.entropy.codec.mixing import _library
from luthier.entropy.codec.mixing_reference import ReferenceMixing
from luthier.entropy.codec.quantize_network import quantize
from luthier.entropy.codec.range_coder import Decoder, Encoder
from luthier.entropy.codec.segment_code import (
    Code,
    code_of,
    find_code,
    most_codes,
    network_bits,
    number_of,
    sample_of,
    varint_bytes,
)

needs_compiler = pytest.mark.skipif(_library().code is None, reason=_library().reason)


class Told:
    """A network that believes in bytes whose high bits are those of its code, and without one in all bytes alike.

    The first dimension names bits 6 and 7, the second bits 4 and 5; it learns nothing.
    """

    sha256 = "ef" * 32
    dims, levels = 2, 4

    def __init__(self) -> None:
        self.read = 0

    def open(self, streams: int, code: Code = (), /) -> NDArray[np.uint32]:
        every = np.arange(256)
        likely = np.ones(256, bool)
        for dim, level in enumerate(code):
            likely &= every >> 6 - 2 * dim & 3 == level
        return np.tile(np.where(likely, 1000, 1).astype(np.uint32), (streams, 1))

    def probabilities(self, state: NDArray[np.uint32], /) -> NDArray[np.uint32]:
        return state

    def advance(self, state: NDArray[np.uint32], data: NDArray[np.uint8], /) -> None:
        self.read += len(data)


def told(sha256: str) -> Network:
    assert sha256 == Told.sha256
    return Told()


def packed(data: bytes, network: Network, **settings: Any) -> bytes:
    target = io.BytesIO()
    compress(io.BytesIO(data), target, size=len(data), network=network, **settings)
    return target.getvalue()


def unpacked(file: bytes, find_network: Any = told) -> bytes:
    target = io.BytesIO()
    decompress(io.BytesIO(file), target, find_network=find_network)
    return target.getvalue()


def kinds(file: bytes) -> list[str]:
    return [kind for kind, _, _ in read_summary(io.BytesIO(file)).frames]


def noise(first: int, last: int, size: int, seed: int = 0) -> bytes:
    """Random bytes in a range: nothing to learn but the range."""
    return np.random.default_rng(seed).integers(first, last, size, np.uint8).tobytes()


# The code (1, 2) of `Told` is right, and worth two to four bits a byte until the mixer has learned as much by itself.
RIGHT, NUMBER = noise(0b01100000, 0b01110000, 300), (1 + 1) + 4 * (2 + 1)


@given(st.integers(2, 16), st.integers(0, 8), st.data())
def test_codes_have_numbers(levels: int, dims: int, data: st.DataObject) -> None:
    code = tuple(data.draw(st.integers(0, levels - 1)) for _ in range(dims))
    number = number_of(code, levels)
    assert code_of(number, levels) == code
    assert number <= most_codes(dims, levels)
    assert varint_bytes(number) == len(container._pack_varint(number))


def test_numbers_leave_no_gaps() -> None:
    codes = [code_of(number, 3) for number in range(most_codes(3, 3) + 1)]
    assert len(set(codes)) == 1 + 3 + 9 + 27
    assert [len(code) for code in codes] == sorted(len(code) for code in codes)
    assert len(code_of(most_codes(3, 3) + 1, 3)) == 4


@pytest.mark.parametrize("size", [1, 100, 511, 1025, 4095, 10_000])
def test_samples_are_spread_over_the_data_and_bounded(size: int) -> None:
    data = np.arange(size, dtype=np.uint32).astype(np.uint8).tobytes()
    sample = sample_of(data)
    assert sample.size == min(4096, len(sample) * min(size, 512))
    assert sample.size <= size or len(sample) == 1
    assert sample[0].tobytes() == data[: sample.shape[1]]
    assert sample[-1].tobytes() == data[-sample.shape[1] :]


def test_the_search_finds_the_code_and_reads_as_much_as_is_said() -> None:
    network, data = Told(), noise(0b01100000, 0b01110000, 50_000)
    assert find_code(network, data) == (1, 2)
    assert network.read == 4096 * (2 * 4 + 1)
    assert find_code(network, noise(0b01000000, 0b10000000, 50_000)) == (1,)  # a second level would be wrong
    assert find_code(network, noise(0, 256, 50_000)) == ()
    assert find_code(network, b"c") == ()  # a byte of code to save less than one


def test_what_the_network_charges_is_what_an_ideal_coder_writes() -> None:
    text = np.frombuffer(RIGHT, np.uint8).reshape(2, -1)
    assert network_bits(Told(), text) == pytest.approx(8 * 300)
    assert network_bits(Told(), text, (1,)) == pytest.approx(300 * math.log2((64_000 + 192) / 1000))


@needs_compiler
def test_a_frame_takes_the_code_that_makes_it_shorter() -> None:
    file = packed(RIGHT, Told())
    assert kinds(file) == ["mixed with a code"]
    assert unpacked(file) == RIGHT
    without = Told()
    without.dims = 0  # type: ignore[misc]
    assert len(file) <= len(packed(RIGHT, without)) - 8


@needs_compiler
def test_a_frame_leaves_the_code_that_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is wrong costs time and not one byte: the mixer goes on as if there had been no code."""
    monkeypatch.setattr(container, "FRAME_BYTES", 400)
    data = noise(0, 160, 1000)
    without = Told()
    without.dims = 0  # type: ignore[misc]
    expected = packed(data, without)
    for wrong in ((0,), (3, 3)):
        monkeypatch.setattr(frames, "find_code", lambda network, data, code=wrong: code)
        assert packed(data, Told()) == expected
    assert kinds(expected) == ["mixed"] * 3


@needs_compiler
def test_frames_with_and_without_codes_build_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "FRAME_BYTES", 300)
    data = RIGHT + noise(0, 255, 300, 1) + RIGHT + b"words " * 50 + noise(0b01100000, 0b01110000, 250, 2)
    done = list[int]()
    file = packed(data, Told(), progress=done.append)
    assert {"mixed", "raw", "mixed with a code"} == set(kinds(file))
    assert sum(done) == len(data)
    assert unpacked(file) == data


@needs_compiler
def test_a_damaged_code_is_told() -> None:
    file = packed(RIGHT[:120], Told())
    place = 4 + 6 + 1 + 32 + 4 + 3  # behind the header, the kind, the size and the length
    assert (file[place - 3], file[place]) == (64, NUMBER)
    for wrong in (0, NUMBER + 1, most_codes(2, 4) + 1, 127):
        damaged = file[:place] + bytes([wrong]) + file[place + 1 :]
        with pytest.raises(DataError, match=r"frame 0 at byte \d+: its (checksum|segment code)") as caught:
            unpacked(damaged)
        assert ("segment code" in str(caught.value)) == (wrong in (0, 21, 127))
    for other in range(place - 3, len(file)):
        with pytest.raises(DataError):
            unpacked(file[:other] + bytes([file[other] ^ 1 << other % 8]) + file[other + 1 :])


@needs_compiler
def test_a_network_without_codes_does_not_decode_one() -> None:
    network = Told()
    network.dims = 0  # type: ignore[misc]
    with pytest.raises(DataError, match=f"its segment code is {NUMBER}, and the network's are 1 to 0"):
        unpacked(packed(RIGHT, Told()), lambda sha256: network)


def network_with_codes(**sizes: int) -> IntegerNetwork:
    """Random weights of a network to which its code matters much."""
    config = ByteModelConfig(
        width=32, layers=1, heads=2, head_width=16, hidden=32, window=16, table_bits=(5,) * 5, **sizes
    )
    model = ByteModel(config)
    model.initialize(1)
    assert model.segment is not None
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.segment.direction.normal_(std=1.0, generator=generator)
        model.head.weight.mul_(6)
    sample = torch.randint(0, 256, (8, 64), generator=generator)
    return IntegerNetwork(quantize(model, sample, {}))


@needs_compiler
@pytest.mark.parametrize("size", [1, 60, 900])
def test_the_integer_network_takes_part_with_its_codes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several streams; and its frames are decoded in Python from what C encoded."""
    monkeypatch.setattr(frames, "SHORT_STREAM", 200)
    monkeypatch.setattr(container, "FRAME_BYTES", 600)
    network = network_with_codes(code_dims=2, code_levels=3)
    data = drawn(network, (2, 0), size)
    file = packed(data, network)
    assert unpacked(file, lambda sha256: IntegerNetwork(network.weights, threads=3)) == data
    if size > 600:
        assert "mixed with a code" in kinds(file)
        slow = IntegerNetwork(network.weights, how="reference")
        target = io.BytesIO()
        decompress(io.BytesIO(file), target, find_network=lambda sha256: slow)
        assert target.getvalue() == data


def drawn(network: IntegerNetwork, code: Code, size: int) -> bytes:
    """What the network itself says under a code."""
    state, rng, text = network.open(1, code), np.random.default_rng(3), bytearray()
    for _ in range(size):
        counts = network.probabilities(state)[0].astype(np.float64)
        text.append(rng.choice(256, p=counts / counts.sum()))
        network.advance(state, np.frombuffer(text[-1:], np.uint8))
    return bytes(text)


class Charging:
    """A coder that adds up what its bits cost."""

    def __init__(self, coder: Encoder | Decoder) -> None:
        self.coder, self.bits = coder, 0.0

    def code(self, bit: int, p16: int) -> int:
        bit = self.coder.code(bit, p16)
        self.bits -= math.log2((p16 if bit else 65536 - p16) / 65536)
        return bit


@needs_compiler
@pytest.mark.parametrize("code", [(), (2, 0)])
def test_the_payload_is_as_long_as_the_estimate(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    """T3: bits of a payload <= those of the mixed probabilities * 1.001 + 64 in each frame, and not fewer either."""
    network = network_with_codes(code_dims=2, code_levels=3)
    monkeypatch.setattr(frames, "find_code", lambda network, data: code)
    begin, charged = ReferenceMixing.begin, list[Charging]()

    def charging(self: ReferenceMixing, *frame: Any) -> None:
        begin(self, *frame)
        charged.append(Charging(self.coder))
        self.coder = charged[-1]  # type: ignore[assignment]

    monkeypatch.setattr(ReferenceMixing, "begin", charging)
    fast, slow = FrameCoder(12, network), FrameCoder(12, network, native=False)
    for number, text in enumerate((drawn(network, (2, 0), 400), Path(__file__).read_bytes()[:300])):
        frame = fast.encode(text)
        assert frame.kind == MIXED
        assert code_of(frame.code, network.levels) == (code if number == 0 else ())
        del charged[:]
        assert slow.decode(frame) == text
        assert charged[0].bits - 8 < 8 * len(frame.payload) <= charged[0].bits * 1.001 + 64


@needs_compiler
def test_the_range_coder_adds_nothing_to_a_network_alone() -> None:
    """The same bound with the integer network's probabilities, without a mixer."""
    network = network_with_codes(code_dims=2, code_levels=3)
    text, coder = np.frombuffer(drawn(network, (1,), 1500), np.uint8), Encoder()
    charging, state = Charging(coder), network.open(1, (1,))
    for place, byte in enumerate(text):
        counts = network.probabilities(state)[0].astype(np.int64)
        node_counts = counts
        for shift in range(7, -1, -1):
            half = len(node_counts) // 2
            ones = int(node_counts[half:].sum()) * 65536 // int(node_counts.sum())
            bit = charging.code(int(byte) >> shift & 1, min(max(ones, 1), 65535))
            node_counts = node_counts[half:] if bit else node_counts[:half]
        network.advance(state, text[place : place + 1])
    payload = coder.finish()
    assert charging.bits == pytest.approx(network_bits(network, text[None], (1,)), rel=2e-3)
    assert 8 * len(payload) <= charging.bits * 1.001 + 64
