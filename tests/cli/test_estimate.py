"""`luthier estimate`: numbers that agree with those counted elsewhere, all costs charged, and words that fit them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.cli.estimate_view import break_even
from luthier.core.run import RunFolder
from luthier.data.sources import open_source
from luthier.data.tokenizer import byte_tokenizer
from luthier.entropy.config import EemConfig
from luthier.entropy.estimators import UPPER_BOUND
from luthier.entropy.network import EntropyModel
from luthier.entropy.network_config import EntropyConfig
from luthier.models.load import save_pretrained

Command = Callable[..., Any]
QUICK = ("--device", "cpu", "--no-compare")
LEARN = (*QUICK, "--context", "64", "--batch-size", "4", "--passes", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Three documents, one of them longer than a piece; none of them plain ASCII."""
    path = tmp_path_factory.mktemp("estimate") / "text.jsonl"
    documents = [text_file.read_text()[:12_000], "Zwölf Striche – then a tap.\n" * 20, "maple"]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Three documents of a kilobyte, for models that learn."""
    path, whole = tmp_path_factory.mktemp("short") / "text.jsonl", text_file.read_text()
    path.write_text("".join(json.dumps({"text": whole[k : k + 1000]}) + "\n" for k in (0, 1000, 2000)))
    return path


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of bytes with random weights, far from uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("causal") / "model"
    save_pretrained(model, byte_tokenizer(), folder, {"verb": "test"})
    return folder


@pytest.fixture(scope="module")
def eem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes with codes of 6 bits for segments of 32, with random weights."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_width": 8, "decoder_width": 8, "heads": 2}
    architecture = EemConfig(vocab_size=257, window=32, dims=3, levels=4, **sizes)
    folder = tmp_path_factory.mktemp("eem") / "model"
    save_pretrained(EntropyModel(EntropyConfig.of(architecture)), byte_tokenizer(), folder, {"verb": "test"})
    return folder


def estimate(luthier: Command, *arguments: Any) -> dict[str, Any]:
    outcome = luthier("estimate", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_a_causal_model_gets_the_number_that_eval_gives(luthier: Command, text: Path, causal: Path) -> None:
    found = estimate(luthier, text, "--model", causal, *QUICK)
    evaluated = json.loads(luthier("eval", causal, "--data", text, "--no-compressors", "--device", "cpu", "--json").out)
    assert found["bits_per_byte"] == pytest.approx(evaluated["bits_per_byte"], rel=1e-5)
    assert found["low"] <= found["bits_per_byte"] <= found["high"]
    assert found["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert found["shares"]["code"] == found["shares"]["header"] == 0
    assert found["model_bytes"] == 4 * sum(p.numel() for p in LlamaForCausalLM.from_pretrained(causal).parameters())


def test_codes_and_headers_are_charged_for_every_segment(luthier: Command, text: Path, eem: Path) -> None:
    found = estimate(luthier, text, "--model", eem, *QUICK)
    size = found["bytes"]
    cheaper, coded, null = found["ways"].values()
    assert null["shares"]["code"] == null["shares"]["header"] == coded["shares"]["header"] == 0
    segments = cheaper["shares"]["header"] * size  # a bit each
    assert segments == pytest.approx(round(segments))
    assert segments >= found["scored_tokens"] / 32
    assert coded["shares"]["code"] * size == pytest.approx(6 * segments)
    for way in found["ways"].values():
        assert way["bits_per_byte"] == pytest.approx(sum(way["shares"].values()))
    assert cheaper["bits_per_byte"] <= min(coded["bits_per_byte"], null["bits_per_byte"]) + segments / size
    assert found["bits_per_byte"] == cheaper["bits_per_byte"]
    assert f"bits/byte = tokens {cheaper['shares']['tokens given the code']:.4f} + embedding" in found["statement"]


def test_the_words_are_those_of_a_bound_and_nothing_more(luthier: Command, text: Path, causal: Path) -> None:
    outcome = luthier("estimate", text, "--model", causal, *QUICK)
    assert UPPER_BOUND in outcome.out
    assert "Code length" in outcome.out
    assert "Whether the model has seen this text in training is not known here." in outcome.out
    assert "pieces of about 8 kB" in outcome.out
    for misleading in ("true entropy", "lower bound", "per-token entropy", "entropy is"):
        assert misleading not in outcome.out


def test_a_text_from_training_is_said_to_be_no_bound(
    luthier: Command, text: Path, causal: Path, tmp_path: Path
) -> None:
    data = [{"name": "a copy under another name", "sha256": open_source(str(text)).sha256}]
    model = LlamaForCausalLM.from_pretrained(causal)
    save_pretrained(model, byte_tokenizer(), tmp_path / "model", {"verb": "test", "data": data})
    words = estimate(luthier, text, "--model", tmp_path / "model", *QUICK)["statement"]
    assert "trained on a copy under another name, which seems to be this text: this is NOT an upper bound" in words


def test_what_training_kept_away_is_no_text_from_training(
    luthier: Command, text: Path, causal: Path, tmp_path: Path
) -> None:
    data = [{"name": "a book [held out]", "sha256": open_source(str(text)).sha256}]
    model = LlamaForCausalLM.from_pretrained(causal)
    save_pretrained(model, byte_tokenizer(), tmp_path / "model", {"verb": "test", "data": data})
    words = estimate(luthier, text, "--model", tmp_path / "model", *QUICK)["statement"]
    assert "training kept a book [held out] away" in words
    assert "NOT an upper bound" not in words


def test_random_letters_are_never_compressible(luthier: Command, tmp_path: Path) -> None:
    """Six bits each, whatever learns them."""
    letters = "".join(chr(0x30 + number) for number in range(64))
    (tmp_path / "noise.txt").write_text("".join(random.Random(0).choices(letters, k=1000)))
    found = estimate(luthier, tmp_path / "noise.txt", "--mode", "prequential", *LEARN)
    assert found["bits_per_byte"] > 6
    assert found["model_bytes"] == 0
    assert found["mode"] == "prequential"


def test_a_model_that_learns_on_the_way_sends_no_weights_and_one_that_came_with_some_does(
    luthier: Command, short: Path, causal: Path
) -> None:
    found = estimate(luthier, short, "--model", causal, "--mode", "prequential", *LEARN)
    held_out = estimate(luthier, short, "--model", causal, *QUICK)
    assert found["bits_per_byte"] < held_out["bits_per_byte"]  # it learns
    assert found["model_bytes"] == held_out["model_bytes"] > 0


def test_cross_fitting_is_said_to_be_no_code_of_this_text(luthier: Command, short: Path, causal: Path) -> None:
    arguments = (short, "--model", causal, "--mode", "cross-fit", *LEARN, "--folds", "2")
    words = estimate(luthier, *arguments)["statement"]
    assert words.startswith("Estimate ")
    assert "no code length of this text" in words
    assert "folds: got 5, but the text has 3 pieces" in luthier("estimate", *arguments[:-1], "5").error


def test_compressors_stand_beside_it_cold_and_conditional(
    luthier: Command, text: Path, eem: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("--baselines", "gzip", "xz")
    found = estimate(luthier, text, "--model", eem, "--given", text_file, *names, "--device", "cpu")
    assert list(found["compressors"]) == ["gzip", "xz"]
    for row in found["compressors"].values():
        assert row["given"] < row["cold"]
        assert row["break_even"] is None  # random weights never pay
    outcome = luthier("estimate", text, "--model", eem, *names, "--device", "cpu")
    assert "never" in outcome.out
    monkeypatch.setattr("shutil.which", lambda name: None)
    refused = luthier("estimate", text, "--model", eem, "--baselines", "zpaq", "--device", "cpu")
    assert refused.error == "baselines: zpaq cannot run here"
    assert "apt-get install zpaq" in refused.err
    monkeypatch.setattr("luthier.cli.estimate.BASELINES", ("gzip", "zpaq"))
    left_out = estimate(luthier, text, "--model", eem, "--baselines", "gzip", "zpaq", "--device", "cpu")
    assert "not installed" in left_out["compressors"]["zpaq"]["missing"]  # by default it is said, not left out


def test_the_break_even_size_pays_for_the_model() -> None:
    assert break_even(1000, 1.5, 2.0) == 16_000
    ours, theirs = 16_000 * 1.5 / 8 + 1000, 16_000 * 2.0 / 8
    assert ours == theirs
    assert break_even(0, 1.5, 2.0) == 0
    assert break_even(1000, 2.0, 2.0) == math.inf


def test_the_run_folder_holds_the_result(luthier: Command, text: Path, eem: Path, tmp_path: Path) -> None:
    found = estimate(luthier, text, "--model", eem, "--out", tmp_path / "run", *QUICK)
    summary = RunFolder.read(tmp_path / "run").summary
    assert summary["verb"] == "estimate"
    assert summary["score"]["bits_per_byte"] == found["bits_per_byte"]
    assert UPPER_BOUND in summary["tables"][0]["note"]
    assert luthier("report", tmp_path / "run").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "held-out needs a model"),
        (("--mode", "prequential", "--passes", "0"), "passes: got 0, expected 1 or more"),
        (("--mode", "prequential", "--learning-rate", "0"), "learning_rate: got 0"),
        (("--mode", "cross-fit", "--folds", "1"), "folds: got 1, expected 2 or more"),
    ],
)
def test_impossible_settings_are_refused(luthier: Command, text: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in luthier("estimate", text, *arguments).error


def test_a_model_with_codes_has_its_own_window_and_does_not_learn(luthier: Command, text: Path, eem: Path) -> None:
    assert "segments of 32 tokens" in luthier("estimate", text, "--model", eem, "--context", "16", *QUICK).error
    refused = luthier("estimate", text, "--model", eem, "--mode", "prequential", *QUICK)
    assert "does not learn on the way" in refused.error


def test_a_context_beyond_the_model_is_refused(luthier: Command, text: Path, causal: Path) -> None:
    refused = luthier("estimate", text, "--model", causal, "--context", "65", *QUICK)
    assert "reads at most 64 tokens" in refused.error
