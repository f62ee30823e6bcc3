"""Conversations as training data: what is learned, what is not, and where windows begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DataError
from luthier.data.chat import encode_chat, render
from luthier.data.files import END_OF_TEXT
from luthier.data.mixture import WindowMixture
from luthier.data.shards import IGNORED, TokenShards, write_shards
from luthier.data.sources import open_source, split
from luthier.data.tokenizer import train_bpe
from luthier.learn.evaluate import code_length
from luthier.learn.prepare import prepare_text, token_stream

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
    ends = [end for end, num_bytes in shards.boundaries().tolist() if num_bytes]
    for end, messages in zip(ends, [*CHATS, DOUBT], strict=True):
        start = end - len(encode_chat(tokenizer, messages).ids)
        assert shards.tokens[start:end].tolist() == encode_chat(tokenizer, messages).ids
        assert start // length == (end - 1) // length


def test_padding_is_a_document_of_its_own(path: Path, tmp_path: Path) -> None:
    length = 128
    shards = shards_of(path, tmp_path / "shards", align=length)
    tokenizer = train_bpe(open_source(str(path)).texts(), 258)
    padded = 0
    for index in range(shards.num_windows(length)):
        ids, documents = shards.window(index, length)[:-1], shards.window_document_ids(index, length)
        padding = ids == tokenizer.pad_token_id
        assert not set(documents[padding].tolist()) & set(documents[~padding].tolist())
        assert (shards.window_targets(index, length) != tokenizer.pad_token_id).all()
        padded += int(padding.sum())
    assert padded
    assert list(shards.decode_documents(tokenizer)) == [
        render(messages).removesuffix(END_OF_TEXT) for messages in [*CHATS, DOUBT]
    ]


def test_shards_are_laid_out_again_for_another_length(path: Path, tmp_path: Path) -> None:
    settings = {"held_out": 0.2, "vocab_size": 258, "seed": 0}
    for length in (128, 64):
        corpus = prepare_text([open_source(str(path))], None, tmp_path, **settings, sequence_length=length)  # type: ignore[arg-type]
        assert [part.align for part in corpus.training] == [length]
    assert corpus.held_out.align == 0


def test_a_measure_of_conversations_counts_the_replies_alone(path: Path, tmp_path: Path) -> None:
    stream = token_stream(shards_of(path, tmp_path / "shards"))
    assert stream.mask is not None
    nats = np.where(stream.mask == 1, 2.0, 100.0)
    score = code_length(stream, nats)
    assert score["loss"] == 2
    assert score["scored_tokens"] == stream.mask.sum() == stream.num_bytes.sum() + len(CHATS) + 1  # bytes, and each EOS
    assert score["bits_per_byte"] == pytest.approx(2 * stream.mask.sum() / np.log(2) / stream.num_bytes.sum())
    head = stream.head(100)
    assert head.mask is not None
    assert len(head.mask) == len(head.tokens)


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
