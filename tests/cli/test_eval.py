from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.cli.eval import EvalConfig, run
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.run import RunFolder
from luthier.data.shards import write_shards
from luthier.data.tokenizer import encode_documents, train_bpe
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config
from luthier.models.load import save_pretrained

LENGTH = 48
DOCUMENTS = ["The luthier planes the top until it rings.", "Zwölf Striche – then a tap.\n" * 3, "maple"]


@pytest.fixture(scope="module")
def tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    return train_bpe([text_file.read_text()], 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> InstellaForCausalLM:
    config = sized_config("nano", tokenizer, vocab_size=300, max_position_embeddings=LENGTH)
    network = InstellaForCausalLM._from_config(config, dtype=torch.float32)
    initialize(network, 7)
    with torch.no_grad():
        network.lm_head.weight.mul_(20)  # far from uniform, so that a shifted target would show
    return network.eval()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The model's folder, beside the text as a file and as token shards."""
    folder = tmp_path_factory.mktemp("eval")
    save_pretrained(model, tokenizer, folder / "model", {"verb": "test"})
    write_shards(DOCUMENTS, tokenizer, folder / "shards", source="three documents")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return folder


def evaluate(folder: Path, **settings: Any) -> dict[str, Any]:
    out = io.StringIO()
    values = {"model": str(folder / "model"), "data": str(folder / "shards"), "device": "cpu", "compressors": False}
    run(EvalConfig(**{**values, **settings}), Console(as_json=True, out=out, err=io.StringIO()))
    return json.loads(out.getvalue())


def by_hand(model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, context: int) -> float:
    """Nats of the documents, token by token: each given what its window holds before it."""
    tokens = [token for ids in encode_documents(tokenizer, DOCUMENTS) for token in ids]
    stream, nats = [tokenizer.eos_token_id, *tokens], 0.0
    for index, token in enumerate(tokens):
        window = 0
        while index >= window + context:
            window += context // 2
        with torch.no_grad():
            logits = model(torch.tensor([stream[window : index + 1]])).logits[0, -1]
        nats -= float(torch.log_softmax(logits.double(), -1)[token])
    return nats


@pytest.mark.parametrize("context", [LENGTH, 16])
def test_bits_per_byte_are_those_counted_by_hand(
    folder: Path, model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: int
) -> None:
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    nats = by_hand(model, tokenizer, context=context)
    score = evaluate(folder, context=context, batch_size=3)
    assert score["bytes"] == num_bytes
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert score["loss"] == pytest.approx(nats / score["scored_tokens"], rel=1e-4)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert score["low"] <= score["bits_per_byte"] <= score["high"]
    assert (score["documents"], score["context"]) == (3, context)


def test_text_and_its_token_shards_score_the_same(folder: Path) -> None:
    shards, text = evaluate(folder), evaluate(folder, data=str(folder / "text.jsonl"))
    assert text["bits_per_byte"] == pytest.approx(shards["bits_per_byte"], rel=1e-9)


def test_the_batch_size_does_not_matter(folder: Path) -> None:
    one, many = evaluate(folder, context=16, batch_size=1), evaluate(folder, context=16, batch_size=7)
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)


def test_max_bytes_keeps_the_first_whole_documents(folder: Path) -> None:
    assert evaluate(folder, max_bytes=50)["documents"] == 1
    assert evaluate(folder, max_bytes=1)["documents"] == 1
    assert evaluate(folder, max_bytes=10_000)["documents"] == 3


def test_compressors_know_what_was_given(folder: Path) -> None:
    rows = {name: (cold, warm) for name, cold, _, warm in evaluate(folder, compressors=True)["table"][1:]}
    assert set(rows) == {"gzip", "bzip2", "xz", "zstd"}
    assert all(warm == "—" for _, warm in rows.values())
    given = evaluate(folder, compressors=True, given=str(folder / "shards"))["table"]
    assert given[0][1] == "—"  # the model knows the text too, so its number stands in the last column
    assert float(given[0][3]) > 0
    for name, cold, _, warm in given[1:]:
        assert (name, cold) == (name, rows[name][0])
        assert float(warm) < float(cold)


def test_the_run_folder_holds_the_result(folder: Path, tmp_path: Path) -> None:
    score = evaluate(folder, out=tmp_path / "run", compressors=True)
    stored = RunFolder.read(tmp_path / "run")
    assert stored.summary["verb"] == "eval"
    assert stored.summary["score"]["bits_per_byte"] == score["bits_per_byte"]
    assert stored.summary["tables"][0]["rows"] == score["table"]
    assert stored.summary["headline"]["bits per byte"].startswith(f"{score['bits_per_byte']:.3f} [")
    RunFolder.open(tmp_path / "run", stored.config).close()  # nobody holds its lock


def test_the_printed_table_says_what_it_is(folder: Path) -> None:
    out = io.StringIO()
    config = EvalConfig(model=str(folder / "model"), data=str(folder / "text.jsonl"), device="cpu")
    run(config, Console(out=out, err=io.StringIO()))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith(f"{sum(len(text.encode()) for text in DOCUMENTS)} bytes in 3 documents")
    assert "per token" in lines[-1]
    assert "contexts of 48 tokens" in lines[-1]


def test_shards_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    write_shards(DOCUMENTS, train_bpe(DOCUMENTS * 2, 270), tmp_path / "other", source="other")
    with pytest.raises(DataError, match="were made by tokenizer"):
        evaluate(folder, data=str(tmp_path / "other"))


def test_a_context_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"context: got 49, but .* reads at most 48"):
        evaluate(folder, context=49)


@pytest.mark.parametrize("settings", [{"context": -1}, {"batch_size": 0}, {"max_bytes": -1}])
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        EvalConfig(model="m", **settings)  # type: ignore[arg-type]


def test_a_stored_config_reruns_the_evaluation(folder: Path, tmp_path: Path, luthier: Callable[..., Any]) -> None:
    evaluate(folder, out=tmp_path / "run")
    outcome = luthier("eval", "--config", tmp_path / "run" / "config.yaml", "--json")
    assert outcome.code == 0, outcome.err
    assert np.isclose(
        json.loads(outcome.out)["bits_per_byte"], RunFolder.read(tmp_path / "run").summary["score"]["bits_per_byte"]
    )


def test_a_models_own_opening_token_is_seen_and_not_charged(
    tmp_path: Path, model: InstellaForCausalLM, text_file: Path
) -> None:
    """Llama-like models never saw a document without their BOS; it is no part of the text."""
    tokenizer = train_bpe([text_file.read_text()], 299)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    save_pretrained(model, tokenizer, tmp_path / "model", {"verb": "test"})
    (tmp_path / "text.txt").write_text(DOCUMENTS[0])
    ids = [*tokenizer(DOCUMENTS[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    seen = [tokenizer.eos_token_id, tokenizer.bos_token_id, *ids[:-1]]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([seen])).logits[0, 1:].double(), -1)
    nats = -float(logprobs[torch.arange(len(ids)), ids].sum())
    score = evaluate(tmp_path, data=str(tmp_path / "text.txt"))
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(DOCUMENTS[0].encode()), rel=1e-4)
