from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from luthier.cli.main import main
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.data.replies import learned_rows
from luthier.data.row_source import open_rows, split_rows
from luthier.data.shards import IGNORED
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Watch, newest_checkpoint, remove_cut_short
from luthier.learn.tuning import arguments as trl_arguments
from luthier.learn.tuning_config import TuningConfig
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, save_pretrained

SETTINGS = {
    "batch-size": 4,
    "micro-batch-size": 2,
    "steps": 4,
    "learning-rate": 1e-3,
    "precision": "fp32",
    "log-every": 1,
    "checkpoint-every": 100,
    "held-out": 0.2,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A random model and a few conversations."""
    folder = tmp_path_factory.mktemp("given")
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"{a}+{b}={a + b}"}]}
        for a in range(8)
        for b in range(5)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe((json.dumps(row) for row in rows), 280)
    config = InstellaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = InstellaForCausalLM(config)
    initialize(model, 0)
    save_pretrained(model, tokenizer, folder / "model", {"verb": "test"})
    return {"model": folder / "model", "data": folder / "chat.jsonl"}


def arguments(given: dict[str, Path], out: Path, **changes: object) -> list[str]:
    settings = {**SETTINGS, **given, "out": out, **{k.replace("_", "-"): v for k, v in changes.items()}}
    flags = [f"--{key}" for key, value in settings.items() if value is True]
    pairs = [part for k, v in settings.items() if not isinstance(v, bool) for part in (f"--{k}", str(v))]
    return ["sft", *pairs, *flags]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def losses(out: Path, kind: str = "train") -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == kind]


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(given, out)) == 0
    return out


def test_it_learns_and_writes_a_model_with_its_provenance(given, straight):
    assert losses(straight)[-1] < losses(straight)[0]
    provenance = json.loads((straight / "model" / "luthier.json").read_text())
    assert provenance["verb"] == "sft"
    assert provenance["parents"][0]["weights"]
    assert provenance["metrics"]["rows"] > 0


def test_a_stopped_run_resumes_to_the_same_weights(given, straight, tmp_path):
    assert main(arguments(given, tmp_path / "run", stop_after=2)) == 130
    assert not (tmp_path / "run" / "model").exists()
    assert main(arguments(given, tmp_path / "run")) == 0
    assert_same(straight, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight)


def test_a_checkpoint_without_its_last_file_is_not_resumed_from(tmp_path):
    for step, whole in ((2, True), (9, True), (10, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    remove_cut_short(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert not (tmp_path / "checkpoint-10").exists()


def test_the_micro_batch_changes_nothing(given, straight, tmp_path):
    assert main(arguments(given, tmp_path / "run", micro_batch_size=4)) == 0
    assert_same(straight, tmp_path / "run", tolerance=1e-5)


def test_sharding_on_the_cpu_beside_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = TuningConfig(out=tmp_path, model="m", shard=True)
    with pytest.raises(ConfigError, match="shard"):
        trl_arguments(TrainingArguments, config, Ranks(world_size=2))


def test_a_model_that_should_be_divided_and_is_not_stops_the_run(tmp_path):
    config = TuningConfig(out=tmp_path, model="m", shard=True)
    watch = Watch(config, None, Ranks(world_size=2), Console())
    with pytest.raises(ConfigError, match="shard"):
        watch.on_train_begin(None, TrainerState(), TrainerControl(), model=torch.nn.Linear(2, 2))


def test_a_sharded_training_state_does_not_fit_one_rank(given, tmp_path, capsys):
    assert main(arguments(given, tmp_path / "run", stop_after=1)) == 130
    (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "pytorch_model_fsdp.bin").touch()
    assert main(arguments(given, tmp_path / "run", shard=True)) == 2
    assert "two ranks or more" in capsys.readouterr().err


def test_the_held_out_loss_is_that_of_each_learned_token(given, straight):
    """Not a mean over batches, which differ in how much there is to learn."""
    model, tokenizer = load_pretrained(straight / "model"), load_tokenizer(straight / "model")
    _, held_out = split_rows(open_rows([str(given["data"])], ["messages"]), SETTINGS["held-out"], TuningConfig.seed)
    nats, tokens = 0.0, []
    rows, _ = learned_rows(tokenizer, held_out.rows, 64, "rows")
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens.append(int((targets != IGNORED).sum()))
    assert len(set(tokens)) > 1
    assert losses(straight, "eval")[-1] == pytest.approx(nats / sum(tokens), abs=1e-5)


@pytest.mark.slow
def test_two_ranks_train_as_one(given, straight, tmp_path, launch):
    out = tmp_path / "run"
    done = launch(2, "-m", "luthier", *arguments(given, out))
    assert done.code == 0, done.out + done.err
    assert_same(straight, out, tolerance=1e-5)
    assert losses(out, "eval") == pytest.approx(losses(straight, "eval"), abs=1e-5)


@pytest.fixture(scope="module")
def shared(given, tmp_path_factory, on_two_ranks) -> Path:
    """Two ranks that share a model: straight, resumed, with adapters; and a run without that cannot go on so."""
    out = tmp_path_factory.mktemp("shared")
    stopped, whole = {"stop_after": 2}, {"shard": False}
    runs = [
        ("straight", {}),
        *(("resumed", changes) for changes in (stopped, {})),
        ("adapters", {"lora_rank": 2}),
        *(("whole", changes) for changes in (whole | {"stop_after": 1}, {}, whole)),
    ]
    commands = [arguments(given, out / name, **{"shard": True, **changes}) for name, changes in runs]
    found = on_two_ranks(*commands)
    assert [part["code"] for part in found] == [0, 130, 0, 0, 130, 2, 0], [part["said"] for part in found]
    half, all_of_it = [[0.5, 0.5]], [[1.0, 1.0]]
    assert [part["held"] for part in found] == [half, [], half, half, [], [], all_of_it]
    assert "written without shard" in found[-2]["said"]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["straight", "adapters", "whole"])
def test_two_ranks_that_share_a_model_train_as_one(given, straight, shared, tmp_path, name):
    if name == "adapters":
        straight = tmp_path / "run"
        assert main(arguments(given, straight, lora_rank=2)) == 0
    assert_same(straight, shared / name, tolerance=1e-5)
    assert losses(shared / name, "eval") == pytest.approx(losses(straight, "eval"), abs=1e-5)
    loaded = load_pretrained(shared / name / "model").state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in weights(shared / name).items())


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_weights(shared):
    assert_same(shared / "straight", shared / "resumed")
    assert losses(shared / "straight") == losses(shared / "resumed")


def test_adapters_are_merged(given, tmp_path):
    assert main(arguments(given, tmp_path / "run", lora_rank=2)) == 0
    before, after = load_file(given["model"] / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"learning_rate": 0.0}, "learning_rate"), ({"betas": (0.9, 1.0)}, "betas"), ({"epochs": -1.0}, "epochs")],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        TuningConfig(out=Path("x"), model="m", **changes)


def test_a_warm_up_is_a_number_of_updates_or_a_share():
    config = TuningConfig(out=Path("x"), model="m", warmup=0.1)
    assert config.warmup_steps(50) == 5
    with pytest.raises(ConfigError, match="warmup"):
        TuningConfig(out=Path("x"), model="m", warmup=500).warmup_steps(50)
