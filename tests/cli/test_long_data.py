from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from luthier.data.chat import encode_chat
from luthier.data.long_documents import generated_sentence
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.llm.stub_server import StubServer
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import save_pretrained

NEEDLES = [
    *("--rows", 12, "--test", 2, "--length", 120, "--test-lengths", 100, 150, "--depths", 0, 1),
    *("--form", "pairs", "--facts", 2, "--questions", 2, "--names", 8, "--copy-words", 3),
]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_needles_by_tokens_of_a_tokenizer_of_their_own(luthier, tmp_path) -> None:
    outcome = luthier("long-data", "--out", tmp_path, "--tokenizer", "own", *NEEDLES)
    assert outcome.code == 0, outcome.err
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    sizes = [len(encode_chat(tokenizer, row["messages"]).ids) for row in rows(tmp_path / "train.jsonl")]
    assert len(sizes) == 12
    assert max(sizes) <= 120
    assert min(sizes) > 100
    tests = rows(tmp_path / "test.jsonl")
    places = [(row["metadata"]["length"], row["metadata"]["depth"]) for row in tests]
    assert places == [(100, 0.0)] * 2 + [(100, 1.0)] * 2 + [(150, 0.0)] * 2 + [(150, 1.0)] * 2
    before = (tmp_path / "train.jsonl").read_bytes()
    assert luthier("long-data", "--out", tmp_path, "--tokenizer", "own", *NEEDLES).code == 0
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_needles_in_a_corpus_by_characters(luthier, tmp_path, text_file) -> None:
    assert luthier("long-data", "--out", tmp_path / "run", "--data", text_file, "--length", 400, *NEEDLES[:4]).code == 0
    first = rows(tmp_path / "run" / "train.jsonl")[0]["messages"][0]["content"]
    assert any(word in first for word in ("luthier", "violin", "spruce"))


def test_questions_need_a_model(luthier, tmp_path, text_file) -> None:
    outcome = luthier("long-data", "--out", tmp_path / "run", "--kind", "qa-long", "--data", text_file)
    assert outcome.code == 2
    assert "qa-long: needs documents and a model" in outcome.error


def test_questions_from_an_endpoint_are_asked_once(luthier, tmp_path, text_file) -> None:
    stub = StubServer(lambda messages, seed, sample: "Question: What rings?\nAnswer: The violin.")
    with stub.running():
        options = [
            *("--kind", "qa-long", "--data", text_file, "--model", "stub", "--endpoint", stub.url),
            *("--length", 5000, "--shortest", 1000, "--part", 400, 1200, "--per-document", 3),
        ]
        outcome = luthier("long-data", "--out", tmp_path / "run", *options)
        assert outcome.code == 0, outcome.err
        assert stub.ledger.requests == 3
        assert luthier("long-data", "--out", tmp_path / "run", *options).code == 0
        assert stub.ledger.requests == 3
    for row in rows(tmp_path / "run" / "train.jsonl"):
        user, reply = row["messages"]
        assert user["content"].endswith("\n\nWhat rings?")
        assert reply["content"] == "The violin."
        assert 4000 < len(user["content"]) < 5100


@pytest.fixture
def guesser(tmp_path) -> Path:
    """A model with random weights and a context of 128 tokens."""
    tokenizer = train_bpe([generated_sentence(random.Random(0)) * 9], 270)
    config = InstellaConfig(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    save_pretrained(InstellaForCausalLM(config), tokenizer, tmp_path / "model", {"verb": "test"})
    return tmp_path / "model"


def test_a_model_is_asked_for_needles_up_to_its_context(luthier, tmp_path, guesser) -> None:
    """A random model finds none and loses what a guess does; replies are kept for the next time."""
    made = luthier(
        *("long-data", "--out", tmp_path / "data", "--tokenizer", guesser, "--rows", 0, "--test", 3),
        *("--test-lengths", 100, 128, 200, "--depths", 0, 1, "--form", "pairs", "--facts", 1, "--questions", 1),
    )
    assert made.code == 0, made.err
    name = f"needle:{tmp_path / 'data' / 'test.jsonl'}"
    outcome = luthier("eval", guesser, "--tasks", name, "--out", tmp_path / "eval", "--json")
    assert outcome.code == 0, outcome.err
    cells = json.loads(outcome.out)[name]
    places = [(cell["length"], cell["depth"], cell["accuracy"]["n"]) for cell in cells]
    assert places == [(n, depth, 6 if depth is None else 3) for n in (100, 128, 200) for depth in (0.0, 1.0, None)]
    assert all(abs(cell["loss"] - math.log(270)) < 1 for cell in cells[:6])
    assert [cell["too_long"] for cell in cells] == [0] * 6 + [3, 3, 6]  # they count as not found
    answers = rows(tmp_path / "eval" / "answers.jsonl")
    assert [row["method"] for row in answers] == ["length 100"] * 6 + ["length 128"] * 6 + ["length 200"] * 6
    assert {row["status"] for row in answers[12:]} == {"failed"}
    again = luthier("eval", guesser, "--tasks", name, "--out", tmp_path / "eval", "--json")
    assert again.out == outcome.out
    beside = luthier("eval", guesser, "--tasks", name, "--out", tmp_path / "other", "--against", tmp_path / "eval")
    assert re.search(r"needle:test, length 128 +6 +\+0.000 \[\+0.000, \+0.000\]", beside.out)
    mixed = luthier("eval", guesser, "--tasks", name, "zebra", "--out", tmp_path / "mixed")
    assert "cannot stand beside needle:FILE" in mixed.error
