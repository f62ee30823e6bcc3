"""Collected rows as what both stages learn from: prompts in the student's own format, replies as text. Loads no torch.

Prompts become ids in one place, here, so that both networks, both stages and whoever measures the student later read
the same ones: the chat template with its cue for the assistant, as in `luthier sft`, or the plain text.

Departure: prompts that are too long are left out and counted; the reference cuts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError
from luthier.data.replies import encode_prompt
from luthier.data.row_source import Row, turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | list[dict[str, str]]
Encode = Callable[[Prompt], list[int]]


@dataclass(frozen=True)
class Lessons:
    """Rows with `prompt` and `completion` (text): to learn from, and held out, one a prompt."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    encode: Encode
    """A prompt as ids."""
    left_out: int
    """Rows whose prompt is too long."""


def prompt_encoder(tokenizer: PreTrainedTokenizerFast, *, raw: bool) -> Encode:
    """How prompts become ids: in the chat template, or as they are."""

    def chat(prompt: Prompt) -> list[int]:
        return encode_prompt(tokenizer, turns("user", prompt), "prompt")

    def plain(prompt: Prompt) -> list[int]:
        return list(tokenizer(str(prompt))["input_ids"])

    return plain if raw else chat


def make_lessons(
    tokenizer: PreTrainedTokenizerFast, train: Sequence[Row], held_out: Sequence[Row], *, raw: bool, longest: int
) -> Lessons:
    """Lessons from rows of kind completion; prompts of more than `longest` tokens are left out.

    Raises: DataError for a completion that is more than one reply, for a prompt that `raw` or the template cannot
    take, and when no row is left on one side.
    """
    encode = prompt_encoder(tokenizer, raw=raw)
    sides = [[_lesson(row, raw, number) for number, row in enumerate(rows, 1)] for rows in (train, held_out)]
    kept = [[row for row in side if 0 < len(encode(row["prompt"])) <= longest] for side in sides]
    for name, side in zip(("train on", "hold out"), kept, strict=True):
        if not side:
            raise DataError(
                f"no row is left to {name}",
                hint="collect more prompts, or a larger share for validation; prompts may also exceed max_lengths",
            )
    first: dict[str, dict[str, Any]] = {}
    for row in kept[1]:
        first.setdefault(str(row["prompt"]), row)
    return Lessons(kept[0], list(first.values()), encode, sum(map(len, sides)) - sum(map(len, kept)))


def _lesson(row: Row, raw: bool, number: int) -> dict[str, Any]:
    prompt, reply = row["prompt"], row["completion"]
    if raw and not isinstance(prompt, str):
        raise DataError(f"row {number}: raw needs prompts that are texts, got messages", hint="leave raw out")
    replies = turns("assistant", reply)
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        raise DataError(
            f"row {number}: a completion must be one reply, got {len(replies)} messages",
            hint="split conversations into a prompt and its last reply",
        )
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns("user", prompt)]
    return {"prompt": prompt if raw else messages, "completion": replies[0]["content"]}
