"""`luthier tokens`: the rows sum to what they say, under both kinds of models, and the page says what it shows."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.tokenizer import byte_tokenizer
from luthier.entropy.config import EemConfig
from luthier.entropy.estimators import ESTIMATORS, PREDICTIVE_ENTROPY, UPPER_BOUND
from luthier.entropy.network import EntropyModel, load_entropy_model
from luthier.entropy.network_config import EntropyConfig
from luthier.models.load import save_pretrained

Command = Callable[..., Any]
TEXT = "Zwölf “Striche” <b>&amp;</b> on the top,\nuntil it rings.\n"
WINDOW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a causal model of bytes and one with codes, both with random weights."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=WINDOW, **sizes))
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_width": 8, "decoder_width": 8, "heads": 2}
    eem = EntropyModel(EntropyConfig.of(EemConfig(vocab_size=257, window=WINDOW, dims=3, levels=4, **layers)))
    with torch.no_grad():
        causal.lm_head.weight.mul_(20)
        eem.lm_head.weight.mul_(20)
    save_pretrained(causal, byte_tokenizer(), folder / "causal", {"verb": "test"})
    save_pretrained(eem, byte_tokenizer(), folder / "eem", {"verb": "test"})
    return folder


def tokens(luthier: Command, folder: Path, model: str, *options: str) -> tuple[dict[str, Any], list[Any], str]:
    out, rows = folder / "page.html", folder / "rows.jsonl"
    where = ("--html", out, "--jsonl", rows, "--device", "cpu", "--json")
    outcome = luthier("tokens", folder / "text.txt", "--model", folder / model, *options, *where)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out), [json.loads(line) for line in rows.read_text().splitlines()], out.read_text()


def test_surprisals_are_those_of_the_model_given_all_its_windows_hold(luthier: Command, folder: Path) -> None:
    found, rows, _ = tokens(luthier, folder, "causal")
    model = LlamaForCausalLM.from_pretrained(folder / "causal").eval()
    ids = [256, *TEXT.encode()]
    for place, row in enumerate(rows):
        window = 0
        while place >= window + WINDOW:
            window += WINDOW // 2
        with torch.no_grad():
            logits = model(torch.tensor([ids[window : place + 1]])).logits[0, -1].double()
        p = torch.softmax(logits, -1)
        own = float(p[ids[place + 1]])
        assert row["surprisal"] == pytest.approx(-math.log2(own), abs=1e-3)
        assert row["predictive_entropy_bits"] == pytest.approx(-float((p * p.log2()).sum()), abs=1e-3)
        assert row["rank"] == int((p >= own).sum())
        assert [p for _, p in row["top"]] == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
    assert b"".join(bytes.fromhex(row["bytes"]) for row in rows) == TEXT.encode()
    assert found["total"] == pytest.approx(sum(row["surprisal"] for row in rows))
    assert found["bits_per_byte"] == pytest.approx(found["total"] / len(TEXT.encode()))


def test_estimates_of_a_model_with_codes_sum_to_what_they_claim(luthier: Command, folder: Path) -> None:
    model = load_entropy_model(folder / "eem")
    raw = charged = null = 0.0
    for segment in torch.tensor([[*TEXT.encode()]]).split(WINDOW, 1):
        with torch.no_grad():
            bits = float(model.nats(segment, model.encode(segment)).sum()) / math.log(2)
            null += float(model.nats(segment, None).sum()) / math.log(2)
        raw, charged = raw + bits, charged + bits + model.code_bits
    for estimator, total in (("auto", charged), ("allocation", charged), ("window", raw), ("surprisal", null)):
        found, rows, _ = tokens(luthier, folder, "eem", "--estimator", estimator)
        assert found["total"] == pytest.approx(total, rel=1e-4)
        assert found["estimator"] == (estimator if estimator != "auto" else "allocation")
        assert len(rows) == len(TEXT.encode())


def test_relative_numbers_are_no_bits(luthier: Command, folder: Path) -> None:
    found, rows, page = tokens(luthier, folder, "eem", "--estimator", "occlusion")
    assert found["bits_per_byte"] is None
    assert max(row["occlusion"] for row in rows) == 1
    assert "not bits and not an entropy" in page
    assert "<dt>bits per byte</dt>" not in page


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_page_says_what_its_numbers_are_and_are_not(luthier: Command, folder: Path, estimator: str) -> None:
    _, _, page = tokens(luthier, folder, "eem", "--estimator", estimator)
    words, label = html.unescape(page), ESTIMATORS[estimator].label
    for part in (*label, PREDICTIVE_ENTROPY.is_not):
        assert part in words
    assert (UPPER_BOUND[1:] in words) == (estimator in ("surprisal", "allocation"))
    assert ("estimates below zero" in words) == (estimator == "window")
    assert ("left out of each segment" in words) == (estimator == "window")
    assert "per-token entropy" not in words
    assert "<b>&amp;amp;</b>" not in page  # the text's own markup is escaped


def test_only_the_beginning_is_shown_and_the_title_says_so(luthier: Command, folder: Path) -> None:
    found, _, page = tokens(luthier, folder, "causal", "--max-bytes", "4")
    assert found["bytes"] == 4
    assert "text.txt, first 4 bytes" in page
    assert tokens(luthier, folder, "causal", "--max-bytes", "3")[0]["bytes"] == 2  # not half of an ö


def test_what_cannot_be_is_refused(luthier: Command, folder: Path) -> None:
    text, model = folder / "text.txt", folder / "causal"
    assert "is for models with codes" in luthier("tokens", text, "--model", model, "--estimator", "window").error
    assert "reads at most 24" in luthier("tokens", text, "--model", model, "--context", "25").error
    assert "max_bytes at least 1" in luthier("tokens", text, "--model", model, "--max-bytes", "0").error
