from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from luthier.cli.run import read_recipe
from luthier.cli.starts import open_start, outline
from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.core.files import sha256_file
from luthier.models.instella_config import InstellaConfig
from luthier.train.config import PretrainConfig
from luthier.train.pretrain import schedule
from luthier.train.start import ModelStart, RunStart, check_shape, check_use

Command = Callable[..., Any]
RECIPE = Path(__file__).parents[2] / "recipes" / "instella-3b" / "pretrain-stage2.yaml"
# § 2.1: linear to exactly 0, no warm-up; updates done -> rate of the next.
STAGE_TWO = {0: 4e-5, 1: 3.999709e-5, 6863: 2.000146e-5, 13_726: 2.914e-9, 13_727: 0.0}


def test_the_recipe_of_stage_two_has_the_papers_seeds_rates_and_tokens(tmp_path: Path) -> None:
    *members, soup = read_recipe(RECIPE, tmp_path)
    assert [stage.config.seed for stage in members] == [5796, 6198, 8915]
    assert soup.config.models == tuple(str(stage.folder) for stage in members)
    for stage in members:
        config = stage.config
        assert config.steps * config.batch_size * config.sequence_length == 57_575_211_008
        for step, rate in STAGE_TWO.items():
            assert schedule(config)(step) == pytest.approx(rate, rel=1e-4, abs=1e-13)
    assert schedule(members[0].config)(13_727) == 0


@pytest.fixture
def again(luthier: Command, text_file: Path, tiny: list[str], tmp_path: Path) -> Command:
    """`again(start, ...)` goes on from a start for four more steps."""

    def run(start: Path, *more: str, out: str = "second") -> Any:
        options = ["--start", str(start), "--data", str(text_file), "--out", str(tmp_path / out)]
        return luthier("pretrain", *options, *instead(tiny, more), *more)

    return run


def instead(options: Sequence[str], more: Sequence[str]) -> list[str]:
    """The options without those, each with its value, that `more` gives anew."""
    kept = list(options)
    for flag in set(more) & set(options):
        if flag.startswith("--"):
            del kept[kept.index(flag) : kept.index(flag) + 2]
    return kept


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def last_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"][-1]


def test_a_run_gives_weights_and_moments_and_says_so(again: Command, trained: Path, tmp_path: Path) -> None:
    outcome = again(trained)
    assert outcome.code == 0, outcome.err
    assert f"start: weights and moments of {trained} after its 4 steps" in outcome.err
    assert first_loss(tmp_path / "second") < first_loss(trained)
    made = json.loads((tmp_path / "second" / "model" / "luthier.json").read_text())
    assert made["parents"] == [
        {
            "model": str(trained / "model"),
            "weights": {"model.safetensors": sha256_file(trained / "model" / "model.safetensors")},
            "moments": True,
        }
    ]
    state = json.loads((tmp_path / "second" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (4, 4 * 4 * 32)  # its own, not those of both runs


def test_a_model_gives_weights_with_new_moments_and_says_so(again: Command, trained: Path, tmp_path: Path) -> None:
    outcome = again(trained / "model")
    assert outcome.code == 0, outcome.err
    assert f"start: weights of {trained / 'model'}; it holds no training state, so the optimizer's" in outcome.err
    assert again(trained, out="kept").code == 0
    assert first_loss(tmp_path / "second") == first_loss(tmp_path / "kept")  # the same weights
    assert last_loss(tmp_path / "second") != last_loss(tmp_path / "kept")  # other moments
    made = json.loads((tmp_path / "second" / "model" / "luthier.json").read_text())
    assert made["parents"][0]["moments"] is False


def test_the_start_is_read_once(again: Command, trained: Path) -> None:
    """A resumed run has a state of its own."""
    assert again(trained, "--stop-after", "2").code == 130
    outcome = again(trained)
    assert outcome.code == 0
    assert "resuming at step 2" in outcome.err
    assert "start:" not in outcome.err


def test_a_bf16_model_is_a_start(again: Command, trained: Path, tmp_path: Path) -> None:
    """Weights that are stored in bf16 get fp32 masters."""
    model = AutoModelForCausalLM.from_pretrained(trained / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "low")
    AutoTokenizer.from_pretrained(trained / "model").save_pretrained(tmp_path / "low")
    assert again(tmp_path / "low").code == 0
    tensors = load_file(tmp_path / "second" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    rounded = tensors["lm_head.weight"].bfloat16().float()
    assert not torch.equal(rounded, tensors["lm_head.weight"])


def test_another_architecture_is_a_start(again: Command, trained: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "llama"
    )
    AutoTokenizer.from_pretrained(trained / "model").save_pretrained(tmp_path / "llama")
    outcome = again(tmp_path / "llama", "--learning-rate", "1e-9", "--weight-decay", "0")
    assert outcome.code == 0, outcome.err
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "llama", tmp_path / "second" / "model")
    )
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    refused = again(tmp_path / "llama", "--document-mask", out="masked")
    assert "document_mask: other architectures cannot be told" in refused.error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "tiny"], "size: got tiny, but {run} is of size nano"),
        (["--vocab-size", "400"], "vocab_size: got 400, but the embedding of {run} has 300 rows"),
        (["--sequence-length", "64"], "sequence_length: got 64, but {run} reads at most 32 tokens"),
        (["--optimizer", "muon"], "optimizer: got muon, but the moments of {run} are those of adamw"),
        (["--model", "other"], "model: got 'other', but the architecture is that of `start`"),
    ],
)
def test_a_contradiction_is_refused(again: Command, trained: Path, options: list[str], told: str) -> None:
    assert again(trained, *options).error.startswith(told.format(run=trained))


def test_another_tokenizer_is_refused_and_the_same_one_is_not(again: Command, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained / "model", tmp_path / "other"))
    assert again(trained, "--tokenizer", str(other), "--stop-after", "1").code == 130
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = again(trained, "--tokenizer", str(other), out="third")
    assert f"tokenizer: {other} is another one than that of {trained}" in outcome.error


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_that_has_no_moments_is_refused(again: Command, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    outcome = again(run)
    assert outcome.error == f"start: {run} is a run of pretrain with 0 training states"
    assert f"give {run / 'model'} to take its weights, with new moments" in outcome.err
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "verb": "soup"}))
    assert again(run).error == f"start: {run} is a run of soup with no such training states"


def test_a_run_that_has_not_ended_is_refused(again: Command, run: Path) -> None:
    shutil.rmtree(run / "model")
    assert again(run).error == f"{run}: this run has no model, expected one that has ended"


def test_a_damaged_state_is_refused(again: Command, run: Path) -> None:
    for file in (run / "checkpoints").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    assert "step-00000004: cannot read this training state" in again(run).error


def test_what_is_no_model_is_refused(again: Command, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert f"start: {tmp_path / 'folder'} is no model folder" in again(tmp_path / "folder").error


def test_a_quantized_model_is_refused(again: Command, run: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    assert again(run / "model").error == f"start: {run / 'model'} is quantized, and codes cannot be trained"


def test_what_a_start_is(trained: Path) -> None:
    of_run, of_model = open_start(str(trained), "adamw"), open_start(str(trained / "model"), "adamw")
    assert isinstance(of_run, RunStart)
    assert of_run.state == trained / "checkpoints" / "step-00000004"
    assert not isinstance(of_model, RunStart)
    assert of_run.source == of_model.source == str(trained / "model")


def test_an_outline_is_read_without_torch(trained: Path, tmp_path: Path) -> None:
    for folder in (trained, trained / "model"):
        found = outline(str(folder))
        assert found is not None
        assert (found.theta, found.length) == (10_000.0, 32)
        assert found.dimensions == InstellaConfig.from_pretrained(trained / "model").dimensions
    assert outline("org/name") is None
    LlamaConfig().save_pretrained(tmp_path)
    assert outline(str(tmp_path)) is None


def test_another_shape_is_that_of_the_start() -> None:
    """Only a named size can contradict `size`."""
    odd = InstellaConfig(
        vocab_size=77, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2
    )
    start = ModelStart(name="odd", source="odd", config=odd)
    config = build(PretrainConfig, {"size": "tiny", "start": "odd"})
    check_shape(config, start)
    check_use(config, start)
    with pytest.raises(ConfigError, match="sequence_length: got 8192, but odd reads at most 4096 tokens"):
        check_use(build(PretrainConfig, {"start": "odd", "sequence_length": 8192}), start)


def test_a_recipe_goes_on_from_its_first_stage(luthier: Command, text_file: Path, tmp_path: Path) -> None:
    """`@pretrain` is the run folder of that stage, whose training state is taken."""
    shared = (
        "size: nano, vocab_size: 300, sequence_length: 32, batch_size: 4, micro_batch_size: 4, steps: 2, "
        f"warmup_steps: 0, eval_every: 0, sample_prompts: [], precision: fp32, device: cpu, data: ['{text_file}']"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"- pretrain: {{{shared}}}\n- pretrain two: {{start: '@pretrain', seed: 1, {shared}}}\n"
        "- soup: {models: ['@pretrain', '@two']}\n"
    )
    outcome = luthier("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert f"start: weights and moments of {tmp_path / 'out' / '01-pretrain'} after its 2 steps" in outcome.err
    outcome = luthier("run", recipe, "--out", tmp_path / "out")
    assert outcome.err.count("done before, skipped") == 3


def test_the_shape_is_the_starts_unless_it_is_said(
    luthier: Command, trained: Path, text_file: Path, tiny: list[str], tmp_path: Path
) -> None:
    options = [part for part in tiny if part not in ("--size", "nano", "--vocab-size", "300")]
    outcome = luthier("pretrain", "--start", trained, "--data", text_file, "--out", tmp_path / "second", *options)
    assert outcome.code == 0, outcome.err
    made, start = (json.loads((run / "model" / "config.json").read_text()) for run in (tmp_path / "second", trained))
    assert made["vocab_size"] == 300
    assert made == start
    unknown = luthier("pretrain", "--start", "somebody/hub-id", "--dry-run")
    assert "so that its shape is not known" in unknown.error


def test_a_dry_run_counts_the_model_of_the_start(luthier: Command, trained: Path) -> None:
    outcome = luthier("pretrain", "--start", trained, "--dry-run", "--json")
    parameters = sum(tensor.numel() for tensor in load_file(trained / "model" / "model.safetensors").values())
    assert json.loads(outcome.out)["parameters"] == f"{parameters:,}"
