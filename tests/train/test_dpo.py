"""Preference optimization: the loss, the rows, the starting model's log-probabilities, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.cli.main import main
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.run import RunFolder
from luthier.data.preferences import preference_rows
from luthier.data.replies import learned_rows
from luthier.data.shards import IGNORED
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import arguments as trl_arguments
from luthier.learn.tuning import quiet_libraries, token_rows
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, save_pretrained
from luthier.train.dpo import TRL_LOSS, PairTrainer, TrlDPOConfig, dpo, dpo_loss, margins
from luthier.train.tuning_configs import DpoConfig

ROWS = [
    {"prompt": f"{a}+{b}?", "chosen": f"{a}+{b}={a + b}", "rejected": f"{a + b + 1}"}
    for a in range(6)
    for b in range(5)
]
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
    """A random model and a few pairs."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = train_bpe((json.dumps(row) for row in ROWS), 280)
    config = InstellaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = InstellaForCausalLM(config)
    initialize(model, 0)
    save_pretrained(model, tokenizer, folder / "model", {"verb": "test"})
    return {"model": folder / "model", "data": folder / "pairs.jsonl"}


def arguments(given: dict[str, Path], out: Path, **changes: object) -> list[str]:
    settings = {**SETTINGS, **given, "out": out, **{k.replace("_", "-"): v for k, v in changes.items()}}
    flags = [f"--{key}" for key, value in settings.items() if value is True]
    return ["dpo", *(part for k, v in settings.items() if v is not True for part in (f"--{k}", str(v))), *flags]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    a, b = weights(first), weights(second)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def metrics(out: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(given, out)) == 0
    return out


# The loss


def scalar_loss(token_logprobs: list, token_references: list, beta: float, *, mean: bool) -> float:
    """Section 3.2 with loops: each argument is a list of pairs of lists of log-probabilities of tokens."""
    total = 0.0
    for pair, references in zip(token_logprobs, token_references, strict=True):
        sides = []
        for tokens, others in zip(pair, references, strict=True):
            score = sum(a - b for a, b in zip(tokens, others, strict=True))
            sides.append(score / len(tokens) if mean else score)
        total += math.log1p(math.exp(-beta * (sides[0] - sides[1])))
    return total / len(token_logprobs)


@pytest.mark.parametrize(("loss", "beta"), [("norm", 5.0), ("sum", 0.1)])
def test_the_loss_is_that_of_the_paper(loss, beta):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (7, 2), generator=generator)
    draw = [
        [[(-3 * torch.rand(int(n), generator=generator)).tolist() for n in pair] for pair in lengths] for _ in range(2)
    ]
    sums = [torch.tensor([[sum(side) for side in pair] for pair in part]) for part in draw]
    found = dpo_loss(margins(*sums, lengths, loss), beta)
    assert found.item() == pytest.approx(scalar_loss(*draw, beta, mean=loss == "norm"), abs=1e-5)


def test_length_moves_the_sum_but_not_the_mean():
    """Every token of both replies gains as much: the mean sees no preference, the sum prefers the longer reply."""
    lengths = torch.tensor([[30, 10], [10, 30]])
    gained = 0.02 * lengths
    assert margins(gained, torch.zeros(2, 2), lengths, "norm").tolist() == pytest.approx([0.0, 0.0])
    assert margins(gained, torch.zeros(2, 2), lengths, "sum").tolist() == pytest.approx([0.4, -0.4])


def made_trainer(given: dict[str, Path], folder: Path, loss: str) -> PairTrainer:
    tokenizer = load_tokenizer(given["model"])
    config = DpoConfig(model=str(given["model"]), data=("x",), out=folder, batch_size=4, precision="fp32", loss=loss)
    rows, _ = preference_rows(tokenizer, ROWS, 64, "rows")
    settings = {"loss_type": [TRL_LOSS[loss]], "beta": config.strength, "precompute_ref_log_probs": True}
    with quiet_libraries():
        return PairTrainer(
            model=load_pretrained(given["model"], dtype=torch.float32),
            args=trl_arguments(TrlDPOConfig, config, Ranks(), max_length=None, **settings),
            train_dataset=token_rows(rows),
            processing_class=tokenizer,
            pace=config,
            keep=lambda name, of, count, measure: list(measure()),
            loss=loss,
        )


@pytest.mark.parametrize("loss", ["norm", "sum"])
def test_the_trainers_loss_is_ours(given, tmp_path, loss):
    trainer = made_trainer(given, tmp_path, loss)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    theirs = trainer._compute_loss(trainer.model, batch, False)
    ours, numbers, _ = trainer.prediction_step(trainer.model, batch, False)
    assert theirs.item() != pytest.approx(math.log(2), abs=1e-3)
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-5)
    assert numbers.shape == (5, 3)


# The rows


def test_a_pair_has_the_ids_that_fine_tuning_learns(given):
    tokenizer = load_tokenizer(given["model"])
    pairs, _ = preference_rows(tokenizer, ROWS, 64, "rows")
    for side in ("chosen", "rejected"):
        learned, _ = learned_rows(tokenizer, [{"prompt": r["prompt"], "completion": r[side]} for r in ROWS], 64, "rows")
        for pair, row in zip(pairs, learned, strict=True):
            assert pair["prompt_ids"] + pair[f"{side}_ids"] == row["input_ids"]
            assert pair[f"{side}_ids"] == [label for label in row["labels"] if label != IGNORED]


def test_messages_and_whole_conversations_give_the_same_ids(given):
    tokenizer, row = load_tokenizer(given["model"]), ROWS[3]
    asked = [{"role": "user", "content": row["prompt"]}]
    reply = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    forms = [
        row,
        {"prompt": asked, **reply},
        {"prompt": row["prompt"], **{side: asked + messages for side, messages in reply.items()}},
    ]
    pairs, _ = preference_rows(tokenizer, forms, 64, "rows")
    assert pairs[0] == pairs[1] == pairs[2]


def test_earlier_replies_are_part_of_the_prompt(given):
    tokenizer = load_tokenizer(given["model"])
    talk = [{"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b"), ("user", "c?"))]
    pairs, _ = preference_rows(tokenizer, [{"prompt": talk, "chosen": "yes", "rejected": "no"}], 64, "rows")
    assert tokenizer.decode(pairs[0]["chosen_ids"]) == "yes<|endoftext|>"
    assert tokenizer.decode(pairs[0]["prompt_ids"]).endswith("c?\n<|assistant|>\n")


def test_long_pairs_are_cut_and_those_without_room_left_out(given):
    tokenizer = load_tokenizer(given["model"])
    whole, _ = preference_rows(tokenizer, ROWS[:1], 64, "rows")
    limit = len(whole[0]["prompt_ids"]) + 1
    cut, _ = preference_rows(tokenizer, ROWS[:1], limit, "rows")
    assert [len(cut[0][f"{side}_ids"]) for side in ("chosen", "rejected")] == [1, 1]
    assert preference_rows(tokenizer, ROWS[:1], limit - 1, "rows") == ([], 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chosen": [{"role": "user", "content": "other?"}, {"role": "assistant", "content": "x"}]}, "not a reply"),
        ({"chosen": [{"role": "assistant", "content": "x"}] * 2}, "a reply follows a reply"),
    ],
)
def test_replies_to_something_else_are_refused(given, changes, said):
    with pytest.raises(DataError, match=said):
        preference_rows(load_tokenizer(given["model"]), [{**ROWS[0], **changes}], 64, "rows")


# Runs


def test_a_model_learns_to_prefer_and_says_what_held_out_pairs_say(straight):
    losses = [row["loss"] for row in metrics(straight, "train")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its own reference
    assert losses[-1] < losses[0] - 0.02
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["metrics"]["pair_accuracy"] > 0.8
    assert summary["metrics"]["margin"] > 0
    assert "held-out pairs moved the right way" in summary["headline"]
    assert json.loads((straight / "model" / "luthier.json").read_text())["verb"] == "dpo"


def test_a_stopped_run_resumes_to_the_same_weights_without_asking_the_reference_again(
    given, straight, tmp_path, monkeypatch
):
    assert main(arguments(given, tmp_path / "run", stop_after=2)) == 130
    monkeypatch.setattr(PairTrainer, "_reference", lambda *_: pytest.fail("asked again"))
    assert main(arguments(given, tmp_path / "run")) == 0
    assert_same(straight, tmp_path / "run")
    assert metrics(tmp_path / "run", "eval")[0]["loss"] == metrics(straight, "eval")[0]["loss"]


def test_another_model_in_the_same_folder_is_another_reference(given, tmp_path):
    """The file of log-probabilities names the weights it was made with."""
    assert main(arguments(given, tmp_path / "run", stop_after=1)) == 130
    before = json.loads((tmp_path / "run" / "reference-train.json").read_text())
    model, tokenizer = load_pretrained(given["model"]), load_tokenizer(given["model"])
    initialize(model, 1)
    config = DpoConfig(model="other", data=("x",), out=tmp_path / "other", batch_size=4, steps=1, precision="fp32")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "reference-train.json").write_text(json.dumps(before))
    rows, _ = preference_rows(tokenizer, ROWS, 64, "rows")
    run = RunFolder(tmp_path / "other")
    dpo(config, model, tokenizer, rows, [], who=Ranks(), run=run, console=Console())
    after = json.loads((tmp_path / "other" / "reference-train.json").read_text())
    assert after["of"] != before["of"]
    assert after["values"] != before["values"]


def test_the_micro_batch_changes_nothing(given, straight, tmp_path):
    assert main(arguments(given, tmp_path / "run", micro_batch_size=4)) == 0
    assert_same(straight, tmp_path / "run", tolerance=1e-5)
    (ours,), (theirs,) = metrics(tmp_path / "run", "eval"), metrics(straight, "eval")
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_adapters_are_merged(given, tmp_path):
    assert main(arguments(given, tmp_path / "run", lora_rank=2)) == 0
    before, after = load_file(given["model"] / "model.safetensors"), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert metrics(tmp_path / "run", "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.fixture(scope="module")
def two_ranks(given, tmp_path_factory, on_two_ranks) -> Path:
    """The run on two ranks: each with the whole model, and each with half of it."""
    out = tmp_path_factory.mktemp("two")
    found = on_two_ranks(arguments(given, out / "whole"), arguments(given, out / "half", shard=True))
    assert [part["code"] for part in found] == [0, 0], [part["said"] for part in found]
    assert [part["held"] for part in found] == [[[1.0, 1.0]], [[0.5, 0.5]]]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("held", ["whole", "half"])
def test_two_ranks_train_as_one(straight, two_ranks, held):
    assert_same(straight, two_ranks / held, tolerance=1e-5)
    (ours,), (alone,) = metrics(two_ranks / held, "eval"), metrics(straight, "eval")
    for name in ("loss", "margin"):
        assert ours[name] == pytest.approx(alone[name], abs=1e-5)


def test_a_dry_run_counts_pairs_and_tokens(given, tmp_path, capsys):
    assert main([*arguments(given, tmp_path / "run"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["updates"] == 4
    assert 0 < told["rows"] < len(ROWS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "named"), [({"beta": -1.0}, "beta"), ({"max_length": 1}, "max_length")])
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        DpoConfig(model="m", data=("x",), **changes)


def test_each_loss_has_its_own_beta():
    assert DpoConfig(model="m", data=("x",)).strength == 5.0
    assert DpoConfig(model="m", data=("x",), loss="sum").strength == 0.1
    assert DpoConfig(model="m", data=("x",), loss="sum", beta=0.3).strength == 0.3
