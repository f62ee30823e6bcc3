from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data import shards
from luthier.data.shards import TokenShards, write_shards
from luthier.data.sources import TextSource
from luthier.data.tokenizer import encode_documents, tokenizer_digest, train_bpe

DOCUMENTS = ["one two three", "e\u0301 is not \u00e9", "<|endoftext|>\r\n", "4 5 6"]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    write_shards(DOCUMENTS, tokenizer, tmp_path / "shards", source="test")
    return tmp_path / "shards"


def test_what_is_written_comes_back(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    opened = TokenShards.open(folder, tokenizer)
    encoded = encode_documents(tokenizer, DOCUMENTS)
    assert list(opened.decode_documents(tokenizer)) == DOCUMENTS
    assert opened.tokens.tolist() == [token for ids in encoded for token in ids]
    assert [opened.document(index).tolist() for index in range(4)] == encoded
    assert opened.num_documents == 4
    assert opened.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert opened.source_sha256 == TextSource("test", DOCUMENTS).sha256
    assert opened.tokens.dtype == np.dtype("<u2")
    assert (folder / "tokens.bin").stat().st_size == 2 * opened.num_tokens


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_survives(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> None:
    opened = write_shards(documents, tokenizer, tmp_path / "any", source="any")
    assert list(opened.decode_documents(tokenizer)) == documents


def test_writing_in_small_batches_changes_nothing(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1)
    write_shards(iter(DOCUMENTS), tokenizer, tmp_path / "again", source="test")
    for name in ("tokens.bin", "documents.bin", "index.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_windows_share_one_token_and_cover_every_target_once(folder: Path) -> None:
    opened = TokenShards.open(folder)
    length = 5
    windows = [opened.window(index, length) for index in range(opened.num_windows(length))]
    targets = np.concatenate([window[1:] for window in windows])
    assert all(len(window) == length + 1 for window in windows)
    assert targets.tolist() == opened.tokens[1 : 1 + len(targets)].tolist()
    assert 0 <= opened.num_tokens - 1 - len(targets) < length
    with pytest.raises(IndexError):
        opened.window(len(windows), length)


def test_document_ids_change_after_each_eos(folder: Path) -> None:
    opened = TokenShards.open(folder)
    for index in range(opened.num_windows(7)):
        inputs = opened.window(index, 7)[:-1]
        expected = np.cumsum([0, *(inputs[:-1] == 0)])
        assert opened.window_document_ids(index, 7).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_truncated_file_is_refused(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{name}: truncated: {len(data) - 1} bytes, but the index says {len(data)}"):
        TokenShards.open(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: truncated: 0 bytes"):
        TokenShards.open(folder)


def test_another_tokenizer_is_refused_by_both_hashes(
    folder: Path, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    other = train_bpe([text], 300)
    with pytest.raises(DataError) as error:
        TokenShards.open(folder, other)
    assert tokenizer_digest(tokenizer) in str(error.value)
    assert tokenizer_digest(other) in str(error.value)
    with pytest.raises(DataError, match="were made by tokenizer"):
        next(TokenShards.open(folder).decode_documents(other))


def test_damaged_or_missing_folders(folder: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'shards'"):
        TokenShards.open(folder.parent / "shard")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 0}))
    with pytest.raises(DataError, match="of format 0, expected 1"):
        TokenShards.open(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        TokenShards.open(folder)


def test_an_interrupted_write_leaves_nothing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def interrupted() -> Iterator[str]:
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tokenizer, tmp_path / "shards", source="test")
    with pytest.raises(DataError, match="no documents to tokenize"):
        write_shards([], tokenizer, tmp_path / "shards", source="test")
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 70_000)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>")
    opened = write_shards(["w69999"], large, tmp_path / "large", source="large")
    assert opened.tokens.dtype == np.dtype("<u4")
    assert opened.tokens.tolist() == [69999, 0]


def test_raw_token_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    raw = tmp_path / "part-0-00000.npy"  # OLMo's name for a file without a NumPy header
    np.arange(100, dtype="<u2").tofile(raw)
    opened = TokenShards.from_raw(raw, tokenizer_sha256=tokenizer_digest(tokenizer))
    opened.check_tokenizer(tokenizer)
    assert opened.num_windows(33) == 3
    assert opened.window(2, 33).tolist() == list(range(66, 100))
    assert TokenShards.from_raw(raw, dtype="uint32").num_tokens == 50
    with pytest.raises(DataError, match="boundaries are unknown"):
        opened.window_document_ids(0, 10)
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(DataError, match="199 bytes are no whole number of uint16 tokens"):
        TokenShards.from_raw(raw)
    np.save(raw, np.arange(3, dtype="<u2"))
    with pytest.raises(DataError, match="has a NumPy header"):
        TokenShards.from_raw(raw)
