"""Replies as token ids, by one rule for teacher and student, so that a discriminator cannot tell them by their ends.

A finished reply ends in exactly one end token, always the same one; a reply cut at the limit has none. Prompts are the
same ids on both sides. Where this is not so, D wins on the presence of an end token and learns nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.tokenizer import decode_text, encode_texts

Ids = list[int]


def teacher_replies(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, limit: int) -> list[Ids]:
    """Texts as ids: with the end token where they fit into `limit` tokens with it, else cut there and without."""
    bodies = encode_texts(tokenizer, texts)
    return [[*body, tokenizer.eos_token_id] if len(body) < limit else body[:limit] for body in bodies]


def student_reply(ids: Sequence[int], end_ids: Collection[int], end_id: int) -> Ids:
    """Sampled ids up to their first end token, which becomes `end_id` whichever of `end_ids` it was."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return [*ids[:place], end_id]
    return list(ids)


def reencoded(replies: Sequence[Ids], tokenizer: PreTrainedTokenizerFast) -> list[Ids]:
    """Replies after decoding and encoding again: the canonical spelling of the same texts. An end token stays.

    A reply whose text is empty stays as it is.
    """
    end = tokenizer.eos_token_id
    finished = [ids[-1] == end for ids in replies]
    texts = [decode_text(tokenizer, ids[: len(ids) - cut]) for ids, cut in zip(replies, finished, strict=True)]
    bodies = encode_texts(tokenizer, texts)
    spelled = [[*body, end] if cut else body for body, cut in zip(bodies, finished, strict=True)]
    return [new or list(old) for new, old in zip(spelled, replies, strict=True)]


def reply_text(completion: Any) -> str:
    """The text of a completion as rows hold it: a string, or TRL's list with one assistant message. DataError."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and len(completion) == 1 and completion[0].get("role") == "assistant":
        return str(completion[0]["content"])
    raise DataError(
        f"a teacher reply must be a string or one assistant message, got {str(completion)[:80]!r}",
        hint="one reply per row: split conversations into a prompt and its last reply",
    )


@dataclass(frozen=True)
class Duels:
    """Student replies and the teacher reply that each of them meets, as ids. Lists of N, and of P <= N for teachers."""

    prompts: list[Ids]
    students: list[Ids]
    teachers: list[Ids]
    owner: Tensor
    """(N,) int64: the teacher reply of each student reply. Its prompt is that of its first student reply."""

    @property
    def student_lengths(self) -> Tensor:
        """Tokens with the end token, (N,)."""
        return torch.tensor([len(ids) for ids in self.students], device=self.owner.device)

    @property
    def teacher_lengths(self) -> Tensor:
        """Tokens with the end token, (P,)."""
        return torch.tensor([len(ids) for ids in self.teachers], device=self.owner.device)

    def sequences(self) -> list[tuple[Ids, Ids]]:
        """Prompt and reply of all N student replies, then of all P teacher replies."""
        first = {int(teacher): n for n, teacher in reversed(list(enumerate(self.owner.tolist())))}
        of_teachers = [(self.prompts[first[p]], reply) for p, reply in enumerate(self.teachers)]
        return [*zip(self.prompts, self.students, strict=True), *of_teachers]


def make_duels(prompts: list[Ids], students: list[Ids], teachers: list[Ids], device: torch.device) -> Duels:
    """Duels from lists of N; neighbours with the same prompt and teacher reply share one teacher reply."""
    distinct, owner = list[Ids](), list[int]()
    for n, reply in enumerate(teachers):
        if n == 0 or reply != teachers[n - 1] or prompts[n] != prompts[n - 1]:
            distinct.append(reply)
        owner.append(len(distinct) - 1)
    return Duels(prompts, students, distinct, torch.tensor(owner, device=device))


def pad_right(sequences: Sequence[tuple[Ids, Ids]], device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T), `last` (B,): where the last reply token is. Padding is id 0, masked."""
    rows = [[*prompt, *reply] for prompt, reply in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "last": last.to(device)}
