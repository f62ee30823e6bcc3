"""Codes in words: the published nibble order, and exact inverses at every width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.quantize.packing import pack, packed_words, unpack


def test_golden_words() -> None:
    assert pack(torch.arange(8, dtype=torch.uint8)[:, None], 4).tolist() == [[0x75316420]]
    assert pack(torch.full((8, 1), 8, dtype=torch.uint8), 4).tolist() == [[-2004318072]]


def test_words_are_laid_out_by_input_channel_then_eight_outputs() -> None:
    codes = torch.zeros(16, 3, dtype=torch.uint8)
    codes[9, 2] = 15  # output 9 is the second of the second word: the fifth nibble
    expected = torch.zeros(3, 2, dtype=torch.int32)
    expected[2, 1] = 15 << 16
    assert torch.equal(pack(codes, 4), expected)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_are_a_little_endian_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = sum(code << (bits * index) for index, code in enumerate(codes.flatten().tolist()))
    assert pack(codes, bits).numpy().tobytes() == stream.to_bytes(4 * bits, "little")


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
def test_unpack_undoes_pack(bits: int, out: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8, generator=draw)
    packed = pack(codes, bits)
    assert packed.shape == (columns, packed_words(out, bits))
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, out), codes)
    filled = unpack(packed, bits, packed_words(out, bits) * 32 // bits)
    assert not filled[out:].any(), "the last words are filled up with zeros"


def test_pack_takes_views() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
    assert torch.equal(unpack(pack(codes.t(), 4), 4, 8), codes.t())
