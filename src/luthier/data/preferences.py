"""Pairs of replies as token ids: what preference optimization reads.

Both replies of a pair follow the same ids, and are themselves the ids that `replies.encode_replies` learns: the text of
the reply and its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from luthier.core.errors import DataError
from luthier.data.replies import encode_replies
from luthier.data.row_source import Row, turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
PairRow = dict[str, list[int]]


def preference_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Iterable[Row], max_length: int, where: str
) -> tuple[list[PairRow], int]:
    """Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, and how many had no room for a reply.

    A prompt and its reply have at most `max_length` tokens: the reply is cut on the right.
    Raises: DataError for replies that do not answer the same conversation.
    """
    kept: list[PairRow] = []
    dropped = 0
    for number, row in enumerate(rows, 1):
        prompt, chosen, rejected = _pair(tokenizer, row, f"{where} row {number}")
        room = max_length - len(prompt)
        if room > 0:
            kept.append({"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]})
        else:
            dropped += 1
    return kept, dropped


def _pair(tokenizer: PreTrainedTokenizerFast, row: Row, where: str) -> tuple[list[int], list[int], list[int]]:
    given = turns("user", row["prompt"])
    prompt, chosen = _split(tokenizer, _conversation(given, row["chosen"], f"{where}, chosen"), where)
    other, rejected = _split(tokenizer, _conversation(given, row["rejected"], f"{where}, rejected"), where)
    if prompt != other:
        raise DataError(
            f"{where}: chosen and rejected do not follow the same conversation",
            hint="put everything before the two replies into prompt",
        )
    return prompt, chosen, rejected


def _conversation(given: list[Message], side: object, where: str) -> list[Message]:
    """Prompt and reply as messages. A side may repeat the prompt and more, as some data sets on the hub do."""
    reply = turns("assistant", side)
    whole = reply if reply[0]["role"] != "assistant" else [*given, *reply]
    if whole[: len(given)] != given or whole[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: not a reply to the prompt", hint="give the reply alone, as a string or one assistant message"
        )
    return whole


def _split(tokenizer: PreTrainedTokenizerFast, messages: list[Message], where: str) -> tuple[list[int], list[int]]:
    """The ids before the last reply, and those of the reply; what a template adds after it is left out."""
    ids, mask = encode_replies(tokenizer, messages, where)
    end = len(mask) - mask[::-1].index(1)
    if messages[-2]["role"] == "assistant":
        raise DataError(f"{where}: a reply follows a reply", hint="join them, or put the first into prompt")
    start = next((i for i in range(end - 1, -1, -1) if not mask[i]), -1) + 1
    return ids[:start], ids[start:end]
