from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.tokenizer import (
    LOSSLESS_PROBES,
    SPLIT_PATTERN,
    decode_text,
    encode_documents,
    encode_texts,
    is_lossless,
    load_tokenizer,
    tokenizer_digest,
    train_bpe,
)


def test_ids_are_those_of_instella(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|padding|>"]
    assert len(tokenizer) == 400


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_string_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode_documents(tokenizer, [text])
    assert ids[-1] == tokenizer.eos_token_id
    assert decode_text(tokenizer, ids[:-1]) == text


@pytest.mark.parametrize("text", ["e\u0301", "\u00e9", "\ufb01 \u212b", *LOSSLESS_PROBES])
def test_unicode_is_not_normalized(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert decode_text(tokenizer, encode_texts(tokenizer, [text])[0]) == text


def test_losslessness_is_detected(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert is_lossless(tokenizer)
    composing = train_bpe([text], 300)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    assert not is_lossless(composing)


def test_special_tokens_in_a_document_are_ordinary_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encode_documents(tokenizer, ["a<|endoftext|>b<|padding|>"])
    assert ids.count(0) == 1
    assert 1 not in ids
    assert decode_text(tokenizer, ids) == "a<|endoftext|>b<|padding|><|endoftext|>"


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding=True)
    backend = tokenizer.backend_tokenizer
    before = (backend.encode_special_tokens, backend.truncation, backend.padding)
    assert before[1:] != (None, None)
    assert [len(ids) for ids in encode_texts(tokenizer, ["123456789", "1"])] == [9, 1]
    assert (backend.encode_special_tokens, backend.truncation, backend.padding) == before
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def test_merges_stay_inside_words(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 1234 ==\n    return")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == [
        *("it", "'s", " ", "1", "2", "3", "4", " ==\n", "   ", " return")
    ]
    assert r"\p{N}{" not in SPLIT_PATTERN


def test_training_is_deterministic_across_processes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    code = (
        "import sys; from luthier.data.tokenizer import train_bpe, tokenizer_digest\n"
        "print(tokenizer_digest(train_bpe([sys.argv[1]] * 2, 400)))"
    )
    other = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True).stdout
    assert other.strip() == tokenizer_digest(tokenizer)


def test_a_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, needs_padding=True)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 1)


def test_the_digest_follows_the_ids_only(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding=True)
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_digest(train_bpe([text] * 2, 399)) != digest


def test_pad_equal_to_eos_is_refused_when_padding_is_needed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    broken = PreTrainedTokenizerFast.from_pretrained(tmp_path, pad_token="<|endoftext|>")
    broken.save_pretrained(tmp_path / "broken")
    assert load_tokenizer(tmp_path / "broken").pad_token_id == 0
    with pytest.raises(DataError, match="the padding token is EOS"):
        load_tokenizer(tmp_path / "broken", needs_padding=True)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(DataError, match="did you mean 'models'"):
        load_tokenizer(tmp_path / "model")
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "models")


@pytest.mark.parametrize(("size", "message"), [(257, "needs at least 258"), (100_000, "supports a vocabulary of")])
def test_impossible_vocabularies(size: int, message: str, text: str) -> None:
    with pytest.raises(DataError, match=message):
        train_bpe([text], size)


def test_a_run_folder_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="a run folder") as error:
        load_tokenizer(tmp_path / "run")
    assert str(tmp_path / "run" / "model") in error.value.hint
