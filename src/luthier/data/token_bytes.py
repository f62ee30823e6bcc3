"""Which bytes a token stands for: of byte-level tokenizers, and of those that write spaces as ▁ and bytes as <0x0A>."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"


def token_bytes(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token; none for special tokens. Joined they are the text, if the tokenizer is lossless."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    letters = _letters()
    spaced = "<0x0A>" in tokenizer.get_vocab()
    found = []
    for number, name in zip(ids, names, strict=True):
        if number in special or name is None:
            found.append(b"")
        elif match := BYTE_TOKEN.fullmatch(name) if spaced else None:
            found.append(bytes([int(match[1], 16)]))
        elif spaced or not all(letter in letters for letter in name):
            found.append(name.replace(SPACE, " ").encode())
        else:
            found.append(bytes(letters[letter] for letter in name))
    return found


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones themselves, others from U+0100.

    The table that GPT-2 introduced and all byte-level tokenizers share.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
