"""Calibration windows: the same for the same seed, never from one document on both sides, never silently too few."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.sources import TextSource, open_source
from luthier.data.tokenizer import decode_text, train_bpe
from luthier.quantize.calibration import (
    Windows,
    calibration,
    from_conversations,
    from_source,
    kept_windows,
    open_calibration,
    self_generated,
    windows,
)
from luthier.quantize.config import QuantizeConfig

CHAT = [
    {"role": "user", "content": "Which wood?"},
    {"role": "assistant", "content": "Spruce for the top, maple for the back."},
]
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    return train_bpe([text_file.read_text()], 300)


def documents(count: int = 60) -> TextSource:
    return TextSource("numbered", tuple(f"document {n} says {'spruce ' * 5}{n * n} and ends.\n" for n in range(count)))


def cut(source: TextSource, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: int) -> Windows:
    settings = {"samples": 6, "validation_samples": 2, "sequence_length": 32, **changes}
    return windows(from_source(source, tokenizer), **settings, seed=seed)


def test_windows_have_the_size_asked_for_and_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    found = cut(documents(), tokenizer)
    assert found.training.shape == (6, 32)
    assert found.validation.shape == (2, 32)
    assert found.training.dtype == torch.int64
    assert tokenizer.pad_token_id not in torch.cat(found)
    assert "spruce" in decode_text(tokenizer, found.training[1].tolist())


def test_the_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (cut(documents(), tokenizer, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.training, other.training)


def test_the_order_of_the_corpus_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    source = documents()
    backwards = replace(source, documents=source.documents[::-1])
    assert all(map(torch.equal, cut(source, tokenizer), cut(backwards, tokenizer)))


def test_more_windows_begin_with_fewer(tokenizer: PreTrainedTokenizerFast) -> None:
    few, many = cut(documents(), tokenizer, samples=3), cut(documents(), tokenizer, samples=6)
    assert torch.equal(few.training, many.training[:3])
    assert torch.equal(few.validation, many.validation)


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_document_is_on_both_sides(repeats: int, tokenizer: PreTrainedTokenizerFast) -> None:
    source = documents(40)
    source = replace(source, documents=source.documents * repeats)
    eos = tokenizer.eos_token_id
    found = [decode_text(tokenizer, part.flatten().tolist()) for part in cut(source, tokenizer)]
    numbers = [{line.split()[1] for line in text.splitlines() if line.startswith("document ")} for text in found]
    assert numbers[0]
    assert numbers[1]
    assert eos in cut(source, tokenizer).training
    marked = [{n for n in range(40) if f"document {n} says" in text} for text in found]
    assert not marked[0] & marked[1]


def test_documents_end_with_eos_and_begin_with_a_bos_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = from_source(documents(), tokenizer).encode(["spruce"])[0]
    assert plain[-1] == tokenizer.eos_token_id
    assert plain[0] != tokenizer.bos_token_id  # BOS is EOS here: it stands before every document but the first
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|padding|>", eos_token="<|endoftext|>"
    )
    assert from_source(documents(), own).encode(["spruce"])[0] == [own.bos_token_id, *plain]


def test_long_documents_are_kept_and_one_file_is_cut(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    source = open_source(str(text_file))
    assert len(source.documents) == 1
    text = from_source(source, tokenizer)
    assert "".join(text.documents) == source.documents[0]
    assert len(text.documents) > 20
    assert cut(source, tokenizer, samples=20).training.shape == (20, 32)


def test_too_little_text_says_how_much(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"numbered: [\d,]+ tokens, but 9,664 are needed for 300 \+ 2 windows"
    ) as caught:
        cut(documents(), tokenizer, samples=300)
    assert "--samples" in caught.value.hint
    with pytest.raises(DataError, match="but 96 are needed"):
        cut(TextSource("short", ("one.",)), tokenizer, samples=1)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_conversations_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    spec = write(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2)
    ids = open_calibration(spec, tokenizer)
    shown = decode_text(tokenizer, ids.encode(ids.documents)[0])
    assert shown.startswith("<|endoftext|><|user|>\nWhich wood?\n<|assistant|>\nSpruce")
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=CHATML
    )
    ids = open_calibration(spec, own).encode([CHAT])[0]
    assert ids.count(own.eos_token_id) == 2
    assert decode_text(own, ids).startswith("<|user|>Which wood?<|endoftext|>")


def test_prompts_with_completions_are_read_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = open_calibration(write(tmp_path / "a.jsonl", [{"prompt": "tap ", "completion": "maple"}]), tokenizer)
    assert plain.documents == ["tap maple"]
    row = {"prompt": CHAT[:1], "completion": "Spruce."}
    turns = open_calibration(write(tmp_path / "b.jsonl", [row]), tokenizer)
    assert turns.documents == [[CHAT[0], {"role": "assistant", "content": "Spruce."}]]
    text = open_calibration(write(tmp_path / "c.jsonl", [{"text": "tap maple"}]), tokenizer)
    assert text.documents == ["tap maple"]


def test_bad_rows_and_missing_templates_are_told(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answer rows, expected text"):
        open_calibration(write(tmp_path / "a.jsonl", [{"prompt": "2+2", "answer": "4"}]), tokenizer)
    with pytest.raises(DataError, match="no such file"):
        open_calibration(str(tmp_path / "none.jsonl"), tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(DataError, match="no chat template"):
        from_conversations("chat", [CHAT], bare)
    strict = "{{ raise_exception('only one turn') }}"
    bare.chat_template = strict
    with pytest.raises(DataError, match="only one turn"):
        from_conversations("chat", [CHAT], bare).encode([CHAT])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape, bos_token_id=0, eos_token_id=0)).eval()


def test_a_model_writes_its_own_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [
        self_generated(model, tokenizer, tokens=300, length=24, seed=seed, batch_size=batch_size)
        for seed, batch_size in ((0, 4), (0, 4), (1, 4))
    ]
    assert texts[0].documents == texts[1].documents
    assert texts[0].documents != texts[2].documents
    ids = [token for document in texts[0].documents for token in document]
    assert len(ids) >= 300
    assert max(map(len, texts[0].documents)) <= 25
    assert max(ids) < 300  # rows of the embedding that the tokenizer does not know are never drawn
    assert len({document[0] for document in texts[0].documents}) > 3


def test_self_is_a_corpus(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    config = QuantizeConfig(model="m", samples=3, validation_samples=2, sequence_length=16, seed=5)
    found = calibration("self", tokenizer, config, lambda: model)
    assert [part.shape for part in found] == [(3, 16), (2, 16)]
    found = calibration(str(text_file), tokenizer, config)
    assert [part.shape for part in found] == [(3, 16), (2, 16)]


def test_a_model_that_writes_nothing_is_given_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.quantize.calibration.PATIENCE", 1)
    monkeypatch.setattr("luthier.quantize.calibration.generate", lambda model, rows, vocabulary: None)
    with pytest.raises(DataError, match=r"the model wrote \d+ tokens in \d+ texts, but 400"):
        self_generated(model, tokenizer, tokens=400, length=100, seed=0, batch_size=4)


def test_windows_are_kept_for_a_resume(tmp_path: Path) -> None:
    path, calls = tmp_path / "data" / "windows.safetensors", []

    def make() -> Windows:
        calls.append(1)
        return Windows(torch.arange(6).view(2, 3), torch.arange(3).view(1, 3))

    for _ in range(2):
        assert [part.tolist() for part in kept_windows(path, make)] == [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2]]]
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        kept_windows(path, make)
