"""Conversations as training data: what is learned, what is not, and where windows begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.data.chat import encode_chat
from luthier.data.mixture import WindowMixture
from luthier.data.shards import IGNORED, TokenShards, write_shards
from luthier.data.sources import open_source, split
from luthier.data.tokenizer import train_bpe

CHATS = [[{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": str(2 * n)}] for n in range(40)]
DOUBT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "3, wait", "weight": 0},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in [*CHATS, DOUBT]))
    return file


def shards_of(path: Path, folder: Path, align: int = 0) -> TokenShards:
    source = open_source(str(path))
    tokenizer = train_bpe(source.texts(), 258)
    return write_shards(
        source.documents, tokenizer, folder, source=source.name, conversations=source.conversations, align=align
    )


def test_only_replies_are_targets(path: Path, tmp_path: Path) -> None:
    shards = shards_of(path, tmp_path / "shards")
    targets = np.concatenate([shards.window_targets(i, 16) for i in range(shards.num_windows(16))])
    learned = bytes(int(token) - 2 for token in targets[targets != IGNORED] if token > 1)
    assert len(learned) > 0
    assert shards.mask is not None
    assert shards.num_bytes == sum(len(messages[1]["content"]) for messages in CHATS) + 1
    tokenizer = train_bpe(open_source(str(path)).texts(), 258)
    ids, mask = encode_chat(tokenizer, DOUBT)
    assert shards.tokens[-len(ids) :].tolist() == ids
    assert shards.mask[-len(ids) :].tolist() == mask
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=True) == "2"


def test_no_conversation_crosses_a_window(path: Path, tmp_path: Path) -> None:
    length = 128
    shards = shards_of(path, tmp_path / "shards", align=length)
    tokenizer = train_bpe(open_source(str(path)).texts(), 258)
    for end, messages in zip(shards.boundaries()[:, 0].tolist(), [*CHATS, DOUBT], strict=True):
        start = end - len(encode_chat(tokenizer, messages).ids)
        assert shards.tokens[start:end].tolist() == encode_chat(tokenizer, messages).ids
        assert start // length == (end - 1) // length


def test_a_mixture_gives_masked_targets(path: Path, tmp_path: Path) -> None:
    mixture = WindowMixture([shards_of(path, tmp_path / "shards", align=64)], sequence_length=64, batch_size=4)
    batch = mixture.next_batch()
    assert (batch["targets"] == IGNORED).any()
    kept = batch["targets"] != IGNORED
    assert (batch["targets"][:, :-1][kept[:, :-1]] == batch["input_ids"][:, 1:][kept[:, :-1]]).all()


def test_splitting_keeps_conversations_whole(path: Path) -> None:
    training, rest = split(open_source(str(path)), 0.2)
    assert training.conversations
    assert rest.conversations
    assert len(training.documents) + len(rest.documents) == len(CHATS) + 1


def test_a_conversation_without_a_reply_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": CHATS[0][:1]}) + "\n")
    with pytest.raises(DataError, match="row 1: no reply to learn"):
        open_source(str(file))
