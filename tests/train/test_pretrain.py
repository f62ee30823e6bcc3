from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, T5Config

from luthier.cli.main import main

QUICK = {
    "--size": "nano",
    "--vocab-size": 280,
    "--sequence-length": 32,
    "--batch-size": 4,
    "--micro-batch-size": 4,
    "--steps": 3,
    "--warmup-steps": 1,
    "--eval-every": 0,
    "--log-every": 1,
    "--precision": "fp32",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [f"The value {i * 37 % 101} is returned when the list holds {i} items.\n" for i in range(600)]
    path.write_text("<|endoftext|>\n".join("".join(lines[i : i + 10]) for i in range(0, 600, 10)))
    return path


def pretrain(corpora, out, *flags, **changes):
    settings = {**QUICK, "--out": out, **{f"--{key.replace('_', '-')}": value for key, value in changes.items()}}
    options = [str(part) for pair in settings.items() for part in pair]
    return main(["pretrain", *options, *flags, "--data", *map(str, corpora)])


def test_the_model_folder_is_one_that_transformers_reads(corpus, tmp_path):
    assert pretrain([corpus], tmp_path / "run") == 0
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "instella"
    ids = tokenizer("The value", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    provenance = json.loads((folder / "luthier.json").read_text())
    assert provenance["verb"] == "pretrain"
    assert {entry["name"].split(" ")[0] for entry in provenance["data"]} == {str(corpus)}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
        GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64),  # tied head, other names, dropout
    ],
    ids=["llama", "gpt2"],
)
def test_any_causal_lm_config_can_be_pretrained(corpus, tmp_path, config):
    config.save_pretrained(tmp_path / "architecture")
    assert pretrain([corpus], tmp_path / "run", model=tmp_path / "architecture") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.model_type == config.model_type
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 0  # the tokenizer's, not the config's
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_document_masks_change_the_loss_and_still_train(corpus, tmp_path):
    first = []
    for name, flags in {"across": (), "within": ("--document-mask",)}.items():
        assert pretrain([corpus], tmp_path / name, *flags, steps=1) == 0
        first.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.05)


def test_two_corpora_with_weights_and_the_same_seed_give_the_same_model(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, paragraph {i}, about names and numbers." for i in range(400)))
    weights = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert pretrain([corpus, other], out, "--weights", "0.25", "0.75") == 0
        weights.append(AutoModelForCausalLM.from_pretrained(out / "model").state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_token_shards_of_one_run_feed_another(corpus, tmp_path):
    assert pretrain([corpus], tmp_path / "first") == 0
    data = tmp_path / "first" / "data"
    changes = {"eval_data": data / "held-out", "tokenizer": data / "tokenizer"}
    assert pretrain([data / "train-0"], tmp_path / "second", **changes) == 0
    first, second = (
        [row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("first", "second")
    )
    assert first == second


def test_a_finished_run_is_not_trained_again(corpus, tmp_path, capsys):
    assert pretrain([corpus], tmp_path / "run") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert pretrain([corpus], tmp_path / "run") == 0
    assert "resuming at step 3" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (T5Config(vocab_size=320, d_model=32, num_layers=1, num_heads=2), "no causal language model"),
        (
            BertConfig(
                vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
            ),
            "its positions see the tokens after them",
        ),
        (
            GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=16),
            "sequence_length: got 32, but .* reads at most 16 tokens",
        ),
    ],
    ids=["encoder-decoder", "encoder", "short"],
)
def test_an_architecture_that_cannot_be_pretrained_is_refused(corpus, tmp_path, capsys, config, told):
    config.save_pretrained(tmp_path / "architecture")
    assert pretrain([corpus], tmp_path / "run", model=tmp_path / "architecture") == 2
    assert re.search(told, capsys.readouterr().err)


def test_an_instella_config_gets_the_papers_initial_weights(corpus, tmp_path):
    """So that one rank and many, which fill weights in after sharding, begin alike."""
    assert pretrain([corpus], tmp_path / "sized", steps=1, warmup_steps=0) == 0
    model = tmp_path / "sized" / "model"
    assert pretrain([corpus], tmp_path / "described", model=model, steps=1, warmup_steps=0) == 0
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("sized", "described")
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention": "flex_attention"}, "flex_attention trains on GPUs only"),
        ({"attention": "flash_attention_2"}, "flash_attention_2 trains on GPUs only"),
        ({"device": "gpu"}, "device: got 'gpu'"),
        ({"eval_data": "shards"}, "eval_data: got 'shards', but text corpora hold a part of themselves out"),
    ],
)
def test_a_setting_that_cannot_be_honored_is_refused(corpus, tmp_path, capsys, changes, told):
    assert pretrain([corpus], tmp_path / "run", **{"device": "cpu", **changes}) == 2
    assert told in capsys.readouterr().err


def test_compiling_without_a_compiler_is_refused(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert pretrain([corpus], tmp_path / "run", compile="on", device="cpu") == 2
    assert "compile: found no C++ compiler" in capsys.readouterr().err
