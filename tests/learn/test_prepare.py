from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.data.shards import TokenShards
from luthier.data.sources import TextSource, open_source
from luthier.data.tokenizer import encode_documents, tokenizer_digest
from luthier.learn.prepare import Corpus, check_vocabulary, open_corpus, prepare_text, token_stream


@pytest.fixture
def source(text_file: Path) -> TextSource:
    return open_source(str(text_file))


def prepare(sources: list[TextSource], folder: Path, **changes: int) -> Corpus:
    settings = {"vocab_size": 300, "seed": 1, **changes}
    return prepare_text(sources, None, folder, held_out=0.1, **settings)


def text_of(parts: list[TokenShards], corpus: Corpus) -> list[str]:
    return [document for part in parts for document in part.decode_documents(corpus.tokenizer)]


def test_training_and_held_out_text_divide_the_corpus(source: TextSource, tmp_path: Path) -> None:
    corpus = prepare([source], tmp_path)
    training, held_out = text_of(corpus.training, corpus), text_of([corpus.held_out], corpus)
    assert len(corpus.tokenizer) == 300
    assert training
    assert held_out
    assert not set(training) & set(held_out)
    assert sorted("".join(training + held_out)) == sorted("".join(source.documents))


def test_several_corpora_share_one_held_out_text(source: TextSource, tmp_path: Path) -> None:
    other = TextSource("other", tuple(f"number {i} is {i * i}.\n" for i in range(200)))
    corpus = prepare([source, other], tmp_path)
    held_out = text_of([corpus.held_out], corpus)
    assert len(corpus.training) == 2
    assert any(text.startswith("number") for text in held_out)
    assert any(not text.startswith("number") for text in held_out)


def test_a_second_call_keeps_what_is_there(source: TextSource, tmp_path: Path) -> None:
    first = prepare([source], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    second = prepare([source], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")} == before
    assert tokenizer_digest(first.tokenizer) == tokenizer_digest(second.tokenizer)


def test_other_text_is_tokenized_again(source: TextSource, tmp_path: Path) -> None:
    first = prepare([source], tmp_path)
    second = prepare([TextSource("changed", (*source.documents, "one more document of the luthier\n"))], tmp_path)
    assert second.training[0].source_sha256 != first.training[0].source_sha256


def test_a_given_tokenizer_is_used_and_reopened(source: TextSource, tmp_path: Path) -> None:
    made = prepare([source], tmp_path / "a").tokenizer
    corpus = prepare_text([source], made, tmp_path / "b", held_out=0.1, vocab_size=9999, seed=1)
    assert tokenizer_digest(corpus.tokenizer) == tokenizer_digest(made)
    again = open_corpus(tmp_path / "b", 1)
    assert again.held_out.sha256 == corpus.held_out.sha256


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_and_leaves_nothing(
    source: TextSource, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="supports a vocabulary of"):
        prepare([source], tmp_path, vocab_size=5000)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_token_stream_says_where_documents_start(source: TextSource, tmp_path: Path) -> None:
    corpus = prepare([source], tmp_path, seed=3)
    documents = text_of([corpus.held_out], corpus)
    stream = token_stream(corpus.held_out)
    encoded = encode_documents(corpus.tokenizer, documents)
    assert stream.tokens.tolist() == [token for ids in encoded for token in ids]
    assert stream.starts.tolist() == np.cumsum([0, *map(len, encoded[:-1])]).tolist()
    assert stream.num_bytes.tolist() == [len(document.encode()) for document in documents]


def test_raw_tokens_cannot_be_scored(tmp_path: Path) -> None:
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "raw.npy")
    with pytest.raises(DataError, match="raw tokens"):
        token_stream(TokenShards.from_raw(tmp_path / "raw.npy"))


def test_an_embedding_must_hold_every_token(source: TextSource, tmp_path: Path) -> None:
    tokenizer = prepare([source], tmp_path).tokenizer
    check_vocabulary(tokenizer, 300)
    with pytest.raises(ConfigError, match="got 299 rows, but the tokenizer has 300 ids"):
        check_vocabulary(tokenizer, 299)
