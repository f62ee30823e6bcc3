"""Conversations as token ids and labels in a model's own chat template: what fine-tuning reads.

With the Instella template the mask is `data.chat`'s. Another template has to say itself what the assistant writes, with
{% generation %} blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.data.chat import CHAT_TEMPLATE, EncodedChat, encode_chat
from luthier.data.row_source import Row, conversation
from luthier.data.shards import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_replies(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], where: str) -> EncodedChat:
    """Ids [T] and a mask [T] that is 1 on the replies and their ends, in the tokenizer's chat template.

    Raises: DataError for a tokenizer without a template or one without {% generation %} blocks, and for a conversation
    that the template refuses.
    """
    template = tokenizer.chat_template
    if template == CHAT_TEMPLATE:
        return encode_chat(tokenizer, messages)
    if not template:
        raise DataError(
            f"{where}: conversations, but the model's tokenizer has no chat template",
            hint="add chat_template.jinja to the model folder",
        )
    if "generation" not in template.replace("add_generation_prompt", ""):
        raise DataError(
            f"{where}: the model's chat template does not say which part the assistant writes",
            hint="put {% generation %}…{% endgeneration %} around the reply in its chat_template.jinja",
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise DataError(
            f"{where}: the model's chat template refuses a conversation ({error})",
            hint="some templates take no system message, or only alternating roles: remove such rows",
        ) from error
    return EncodedChat(list(encoded["input_ids"]), list(encoded["assistant_masks"]))


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], where: str) -> list[int]:
    """Ids of a conversation that ends with the template's cue for the assistant: what a reply is sampled after.

    Raises: DataError for a tokenizer without a template, and for a conversation that the template refuses.
    """
    template = tokenizer.chat_template
    if template == CHAT_TEMPLATE:
        return encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    if not template:
        raise DataError(
            f"{where}: questions, but the model's tokenizer has no chat template",
            hint="add chat_template.jinja to the model folder",
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise DataError(
            f"{where}: the model's chat template refuses a question ({error})",
            hint="some templates take no system message, or only alternating roles: remove such rows",
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def learned_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Iterable[Row], max_length: int, where: str
) -> tuple[list[dict[str, list[int]]], int]:
    """Rows with `input_ids` and `labels` (IGNORED where nothing is learned), and how many had nothing left to learn.

    Rows are of kind messages or completion; longer ones are cut on the right at `max_length` tokens.
    """
    kept: list[dict[str, list[int]]] = []
    dropped = 0
    for number, row in enumerate(rows, 1):
        ids, mask = encode_replies(tokenizer, conversation(row), f"{where} row {number}")
        labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)][:max_length]
        if any(label != IGNORED for label in labels[1:]):  # nothing predicts the first token
            kept.append({"input_ids": ids[:max_length], "labels": labels})
        else:
            dropped += 1
    return kept, dropped
