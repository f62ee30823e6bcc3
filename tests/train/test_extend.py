from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.cli.run import read_recipe
from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.models.arithmetic import extended_rope_theta
from luthier.models.instella_config import InstellaConfig
from luthier.train.extend import lengthened
from luthier.train.extend_config import ExtendConfig, new_theta
from luthier.train.pretrain import schedule
from luthier.train.start import ModelStart

Command = Callable[..., Any]
RECIPE = Path(__file__).parents[2] / "recipes" / "instella-3b" / "long.yaml"
QUICK = [
    *("--sequence-length", "64", "--batch-size", "2", "--micro-batch-size", "2", "--steps", "3", "--warmup-steps", "1"),
    *("--eval-every", "0", "--precision", "fp32", "--device", "cpu", "--compile", "off", "--sample-prompts"),
]


def test_the_recipe_has_the_papers_numbers(tmp_path: Path) -> None:
    first, second = (stage.config for stage in read_recipe(RECIPE, tmp_path))
    tokens = [config.steps * config.batch_size * config.sequence_length for config in (first, second)]
    assert tokens == [20_971_520_000, 20_971_520_000]
    assert second.start == str(first.out)  # so the moments go on
    assert (first.sequence_parallel, second.sequence_parallel) == (1, 4)
    theta = new_theta(first, 10_000, 4096)
    assert theta == pytest.approx(514_640.3, abs=0.1)
    assert new_theta(second, theta, 65_536) == pytest.approx(3_691_949.2, abs=0.1)
    assert sum(first.weights) == pytest.approx(1)
    assert sum(second.weights) == pytest.approx(1)
    rate = schedule(first.as_pretraining())
    assert [rate(step) for step in (0, 500, 2500, 5000)] == pytest.approx([2e-6, 2e-5, 1.112e-5, 2e-8], rel=1e-4)


def test_the_recipe_says_its_cost_without_torch(luthier_without_torch: Command, tmp_path: Path) -> None:
    outcome = luthier_without_torch("run", RECIPE, "--dry-run", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    for told in ("10,000 → 514,640", "4,096 → 65,536 tokens", "20,971,520,000", "figures for the paper's 3B"):
        assert told in outcome.out


@pytest.fixture(scope="module")
def longer(luthier: Command, trained: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished phase 1 that doubled the context of the trained model, from 32 tokens."""
    out = tmp_path_factory.mktemp("longer") / "run"
    outcome = luthier("extend", trained / "model", "--data", text_file, "-o", out, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "it holds no training state, so the optimizer's moments begin at zero" in outcome.err
    return out


def test_the_model_folder_says_base_and_length_to_every_reader(longer: Path) -> None:
    theta = extended_rope_theta(10_000, 32, 64)
    told = json.loads((longer / "model" / "config.json").read_text())
    assert told["rope_parameters"] == {"rope_type": "default", "rope_theta": pytest.approx(theta)}
    assert told["rope_theta"] == pytest.approx(theta)  # what transformers 4 reads
    assert told["max_position_embeddings"] == 64
    model = AutoModelForCausalLM.from_pretrained(longer / "model")
    exponents = torch.arange(0, 32, 2) / 32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 1 / theta**exponents)
    assert model(torch.arange(64)[None]).logits.isfinite().all()


def test_the_report_says_what_was_done(longer: Path) -> None:
    summary = json.loads((longer / "summary.json").read_text())
    assert summary["verb"] == "extend"
    assert summary["headline"]["context"] == "64 tokens, RoPE base 504,908"
    made = json.loads((longer / "model" / "luthier.json").read_text())
    assert (made["verb"], made["chat"], made["parents"][0]["moments"]) == ("extend", False, False)


def test_the_second_phase_keeps_the_moments(luthier: Command, longer: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["128" if part == "64" else part for part in QUICK]
    outcome = luthier("extend", longer, "--data", text_file, "-o", tmp_path / "two", *options)
    assert outcome.code == 0, outcome.err
    assert f"start: weights and moments of {longer} after its 3 steps" in outcome.err
    told = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert told["rope_theta"] == pytest.approx(extended_rope_theta(10_000, 32, 128))
    assert told["max_position_embeddings"] == 128


def test_replies_alone_are_learned_from_conversations(
    luthier: Command, trained: Path, text_file: Path, tmp_path: Path
) -> None:
    words = text_file.read_text().split()
    rows = [
        [{"role": "user", "content": " ".join(words[i : i + 5])}, {"role": "assistant", "content": words[i + 5]}]
        for i in range(0, 1200, 6)
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    outcome = luthier("extend", trained / "model", "--data", chat, "-o", tmp_path / "run", *QUICK)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "model" / "luthier.json").read_text())["chat"] is True
    assert "only the replies count" in json.loads((tmp_path / "run" / "summary.json").read_text())["context"]


def test_two_corpora_with_weights(luthier: Command, trained: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, paragraph {i}, about wood and bows." for i in range(300)))
    data = ["--data", text_file, other, "--weights", "3", "1"]
    outcome = luthier("extend", trained / "model", *data, "-o", tmp_path / "run", *QUICK)
    assert outcome.code == 0, outcome.err
    before = load_file(trained / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_dry_run_reads_the_model_that_is_there(luthier: Command, trained: Path) -> None:
    outcome = luthier("extend", trained, "--sequence-length", "128", "--dry-run", "--json")
    told = json.loads(outcome.out)
    assert told["RoPE base"] == f"10,000 → {extended_rope_theta(10_000, 32, 128):,.0f}"
    assert told["context"] == "32 → 128 tokens"
    assert told["tokens"] == f"{150 * 4 * 128:,}"


def start(**settings: object) -> ModelStart:
    return ModelStart(name="m", source="m", config=InstellaConfig(**settings))


def extension(**settings: object) -> ExtendConfig:
    return build(ExtendConfig, {"start": "m", "sequence_length": 8192, **settings})


def test_the_start_itself_is_left_as_it_is() -> None:
    first = start()
    longer = lengthened(first, extension())
    assert first.config.rope["rope_theta"] == 10_000
    assert longer.config.rope["rope_theta"] == pytest.approx(26_784, abs=0.6)
    assert (first.config.max_position_embeddings, longer.config.max_position_embeddings) == (4096, 8192)


def test_a_model_never_gets_shorter() -> None:
    same = lengthened(start(), extension(theta="keep", sequence_length=1024))
    assert same.config.max_position_embeddings == 4096


def test_only_an_instella_with_plain_rope_is_extended() -> None:
    with pytest.raises(ConfigError, match="start: m is of type llama, expected an Instella"):
        lengthened(ModelStart(name="m", source="m", config=LlamaConfig()), extension())
    scaled = start(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0})
    with pytest.raises(ConfigError, match=r"the RoPE of m is scaled \(linear\)"):
        lengthened(scaled, extension())


def test_a_shorter_context_is_refused_by_the_verb(luthier: Command, trained: Path, tmp_path: Path) -> None:
    outcome = luthier("extend", trained / "model", "-o", tmp_path / "run", "--sequence-length", "16")
    assert outcome.error == "sequence_length: got 16, but the model was trained with 32 already"
