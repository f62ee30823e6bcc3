"""Codes in 32-bit words, as checkpoints store them.

Four bits are in AWQ's order, which every reader of such checkpoints knows. The paper has no other width; ours is a
little-endian bit stream along the outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble p of a word holds output AWQ_ORDER[p]


def packed_words(out: int, bits: int) -> int:
    """int32 words of a column of `out` codes: whole blocks of codes that fill whole words."""
    codes, words = _block(bits)
    return -(-out // codes) * words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, n) uint8 below 2^bits as words (n, `packed_words`) int32; the last words are filled up with 0."""
    out, columns = codes.shape
    size, words = _block(bits)
    blocks = -(-out // size)
    codes = torch.cat([codes, codes.new_zeros(blocks * size - out, columns)]).view(blocks, size, columns)
    packed = torch.zeros(blocks, words, columns, dtype=torch.int32, device=codes.device)
    for index, position in enumerate(_positions(bits)):
        word, shift = divmod(position, WORD)
        code = codes[:, index].int()
        packed[:, word] |= code << shift
        if shift + bits > WORD:
            packed[:, word + 1] |= code >> (WORD - shift)
    return packed.view(blocks * words, columns).t().contiguous()


def unpack(packed: Tensor, bits: int, out: int) -> Tensor:
    """The codes (out, n) uint8 of words (n, `packed_words`) int32."""
    size, words = _block(bits)
    columns, blocks = packed.shape[0], packed.shape[1] // words
    packed = packed.t().reshape(blocks, words, columns)
    codes = torch.empty(blocks, size, columns, dtype=torch.uint8, device=packed.device)
    for index, position in enumerate(_positions(bits)):
        word, shift = divmod(position, WORD)
        code = packed[:, word] >> shift
        if shift + bits > WORD:
            low = (1 << (WORD - shift)) - 1  # the shift above copies the sign
            code = (code & low) | (packed[:, word + 1] << (WORD - shift))
        codes[:, index] = code & ((1 << bits) - 1)
    return codes.view(blocks * size, columns)[:out].contiguous()


def _block(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole words, and the number of these words."""
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common


def _positions(bits: int) -> list[int]:
    """The first bit of each code of a block."""
    if bits == 4:
        return [bits * AWQ_ORDER.index(output) for output in range(len(AWQ_ORDER))]
    return [bits * output for output in range(_block(bits)[0])]
