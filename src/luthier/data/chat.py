"""Conversations as token ids with a loss mask.

The mask is 1 on what the model has to write: the reply and its EOS. It is 0 on BOS, on everything that others say, on
the `<|assistant|>` line and on the newline after a reply's EOS.

Departure from `tokenizer.apply_chat_template(..., return_assistant_tokens_mask=True)`: text inside a message that looks
like a special token stays ordinary text, and a reply is tokenized apart from the line before it, as it is in
generation. On other conversations the two agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from luthier.core.errors import DataError
from luthier.data.template import CHAT_TEMPLATE, GENERATION_PROMPT, render, segments
from luthier.data.tokenizer import decode_text, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "GENERATION_PROMPT", "EncodedChat", "encode_chat", "preview", "render"]


class EncodedChat(NamedTuple):
    """Token ids [T] and a mask [T] that is 1 on the tokens to learn."""

    ids: list[int]
    loss_mask: list[int]


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> EncodedChat:
    """Encode a conversation in the Instella format: BOS, then the messages.

    A conversation without a reply has an all-zero mask.
    Raises: DataError for bad messages, or a tokenizer without BOS and EOS.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise DataError("the tokenizer lacks BOS or EOS", hint="set bos_token and eos_token in tokenizer_config.json")
    pieces = segments(messages, add_generation_prompt=add_generation_prompt)
    encoded = iter(encode_texts(tokenizer, [text for text, _ in pieces if text is not None]))
    ids, mask = [tokenizer.bos_token_id], [0]
    for text, trained in pieces:
        piece = [tokenizer.eos_token_id] if text is None else next(encoded)
        ids += piece
        mask += [int(trained)] * len(piece)
    return EncodedChat(ids, mask)


def preview(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> str:
    """The conversation as the model sees it, with ⟦ ⟧ around what is trained on."""
    ids, mask = encode_chat(tokenizer, messages)
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            piece = decode_text(tokenizer, ids[start:end])
            text += f"⟦{piece}⟧" if mask[start] else piece
            start = end
    return text
