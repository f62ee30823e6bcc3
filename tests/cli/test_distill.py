"""`luthier distill` and `luthier gauge` from end to end: a random student, and a teacher that writes brackets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.cli.main import main
from luthier.core.errors import ConfigError
from luthier.core.files import sha256_file
from luthier.data.tokenizer import train_bpe
from luthier.distill import alarms
from luthier.distill.distill_config import DistillConfig
from luthier.models import load
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import save_pretrained

SETTINGS = {
    "batch-size": 4,
    "micro-batch-size": 8,
    "generations": 2,
    "steps": "2 2",
    "max-lengths": "64 8",
    "discriminator-alone": 1,
    "learning-rate": 1e-2,
    "warmup-learning-rate": 1e-2,
    "discriminator-learning-rate": 1e-3,
    "precision": "fp32",
    "log-every": 1,
    "eval-every": 0,
}
EXPECTED = ["length", "n-grams"]


def write_model(folder: Path, *, width: int = 16, vocabulary: int = 258) -> Path:
    """A model with random weights."""
    config = InstellaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = InstellaForCausalLM(config)
    initialize(model, 0)
    save_pretrained(model, train_bpe(["abcd" * 9], vocabulary), folder, {"verb": "test"})
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A student with random weights, and 40 prompts with the teacher's replies, most of them held out."""
    folder = tmp_path_factory.mktemp("given")
    write_model(folder / "student")
    collected = ["collect", "brackets:40", "--model", "brackets:max_tokens=8", "--seed", "1", "--validation", "0.75"]
    assert main([*collected, "-o", str(folder / "teacher")]) == 0
    return {"model": folder / "student", "teacher": folder / "teacher"}


def arguments(given: dict[str, Path], out: Path, *more: str, **changes: object) -> list[str]:
    settings = {**SETTINGS, **given, "out": out, **{k.replace("_", "-"): v for k, v in changes.items()}}
    return ["distill", *(part for k, v in settings.items() for part in (f"--{k}", *str(v).split())), *more]


def rows(folder: Path, kind: str) -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in read if row["kind"] == kind]


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    for name in ("model/model", "gad/discriminator/model", "gad/discriminator/discriminator_head"):
        a, b = (load_file(run / f"{name}.safetensors") for run in (first, second))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(given, out, "--force")) == 0
    return out


def test_a_run_writes_both_stages_a_model_and_where_it_comes_from(given, straight):
    for part in ("warmup/model", "warmup/discriminator", "gad/discriminator", "model"):
        assert (straight / part / "luthier.json").is_file()
    made = json.loads((straight / "model" / "luthier.json").read_text())
    assert made["teacher"]["sha256"] == sha256_file(given["teacher"] / "teacher.json")
    warmed = json.loads((straight / "warmup" / "model" / "luthier.json").read_text())
    assert made["parents"][0] == {"model": str(straight / "warmup" / "model"), "weights": warmed["weights"]}
    assert warmed["parents"][0]["model"] == str(given["model"])
    summary = json.loads((straight / "summary.json").read_text())
    gate, held_out = summary["tables"]
    assert [row[0] for row in gate["rows"]] == ["discriminator", *EXPECTED]
    assert len(held_out["rows"]) == 5
    assert [row["step"] for row in rows(straight, "train")] == [1, 2, 3, 4]
    assert "Learning curves" in (straight / "report.html").read_text()


def test_the_student_moves_in_both_stages(given, straight):
    start, warmed, final = (
        load_file(folder / "model.safetensors")
        for folder in (given["model"], straight / "warmup/model", straight / "model")
    )
    for a, b in ((start, warmed), (warmed, final)):
        assert any(not torch.equal(a[name], b[name]) for name in a)


def test_stopped_anywhere_refused_at_the_gate_and_resumed_equals_a_straight_run(given, straight, tmp_path, capsys):
    out = tmp_path / "run"
    stopped = arguments(given, out, stop_after=1)
    assert [main(stopped), main(stopped)] == [130, 130]  # within the warm-up, and after it
    assert "after the warm-up" in capsys.readouterr().err
    assert main(stopped) == 2
    told = capsys.readouterr().err
    assert "held-out accuracy 0." in told
    assert "against length 0." in told
    assert "force" in told
    assert not (out / "model").exists()
    assert [main([*stopped, "--force"]) for _ in range(2)] == [130, 0]
    assert_same(straight, out)
    for file in ("before.json", "after.json"):
        assert (out / "gad" / file).read_text() == (straight / "gad" / file).read_text()
    timed = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run, "train")] for run in (straight, out)
    ]
    assert [row["step"] for row in timed[0]] == [row["step"] for row in timed[1]]


@pytest.mark.slow
def test_two_ranks_may_share_the_student_or_stop(given, tmp_path, on_two_ranks):
    whole, half, resumed = (tmp_path / name for name in ("whole", "half", "resumed"))
    found = on_two_ranks(
        arguments(given, whole, "--force"),
        arguments(given, half, "--force", "--shard"),
        arguments(given, resumed, "--force", stop_after=1),
        arguments(given, resumed, "--force"),
    )
    assert [part["code"] for part in found] == [0, 0, 130, 0], [part["said"] for part in found]
    assert [part["held"] for part in found] == [[[1, 1]] * 2, [[0.5, 0.5]] * 2, [], [[1, 1]] * 2]
    assert_same(whole, resumed)
    assert_same(whole, half, tolerance=1e-5)


def test_what_is_done_is_not_done_again(given, straight):
    before = (straight / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(arguments(given, straight, "--force")) == 0
    assert (straight / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_arm_begins_after_the_same_warm_up(given, straight, tmp_path):
    """The reward of this one is length alone, so no gate stops it. Its evaluations look for what alarms need."""
    out = tmp_path / "run"
    assert main(arguments({**given, "model": straight}, out, reward="length", eval_every=1, fresh_steps=2)) == 0
    fresh = [row["fresh_accuracy"] for row in rows(out / "gad", "eval") if "fresh_accuracy" in row]
    assert len(fresh) == 2
    assert all(0 <= accuracy <= 1 for accuracy in fresh)
    assert not (out / "warmup").exists()
    assert (out / "gad" / "before.json").read_text() == (straight / "gad" / "before.json").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tables"][0]["title"] == "Gate: shut; the reward does not need it"


@pytest.mark.slow
def test_an_alarm_stops_the_run_and_another_action_goes_on(given, straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(alarms, "raised", lambda history, limits: {"length drift": "replies are 9 tokens long"})
    out, start = tmp_path / "run", {**given, "model": straight}
    assert main(arguments(start, out, "--force", "--on-alarm", "stop", checkpoint_every=1)) == 2
    assert "stopped by an alarm at step 1 of 2: length drift: replies are 9" in capsys.readouterr().err
    assert main(arguments(start, out, "--force", "--on-alarm", "lower_rate", checkpoint_every=1)) == 0
    summary = json.loads((out / "summary.json").read_text())
    table = summary["tables"][2]
    assert int(summary["headline"]["alarms"]) == len(table["rows"])
    assert table["rows"][-1] == ["2", "length drift: replies are 9 tokens long"]


@pytest.mark.slow
def test_data_in_place_of_a_folder_is_split_by_prompt(given, tmp_path):
    out = tmp_path / "run"
    given = {"model": given["model"], "data": given["teacher"] / "replies.jsonl"}
    assert main(arguments(given, out, "--force", "--raw", held_out=0.4, steps="1 1")) == 0
    made = json.loads((out / "model" / "luthier.json").read_text())
    assert made["chat"] is False
    assert len(made["data"]) == 2


def test_a_larger_discriminator_reads_the_students_tokens(given, straight, tmp_path, capsys, monkeypatch):
    read = load.load_pretrained
    large, out = write_model(tmp_path / "large", width=32), tmp_path / "run"
    asked = arguments(given, out, "--force", discriminator=large, eval_every=1, fresh_steps=1)
    assert main([*asked, "--dry-run"]) == 0
    parameters = sum(tensor.numel() for tensor in load_file(large / "model.safetensors").values()) - 258 * 32
    assert f"whole on each rank ({parameters:,} parameters)" in capsys.readouterr().out
    assert main(asked) == 0
    for stage in ("warmup", "gad"):
        assert load_file(out / stage / "discriminator" / "discriminator_head.safetensors")["weight"].shape == (1, 32)
    warmed = json.loads((out / "warmup" / "discriminator" / "luthier.json").read_text())
    assert [parent["model"] for parent in warmed["parents"]] == [str(large)]
    loaded = list[str]()
    monkeypatch.setattr(load, "load_pretrained", lambda name, **kw: loaded.append(str(name)) or read(name, **kw))
    capsys.readouterr()
    again = arguments({**given, "model": out}, tmp_path / "again", "--force", eval_every=1, fresh_steps=1)
    assert main([*again, "--dry-run"]) == 0
    assert f"whole on each rank ({parameters:,} parameters)" in capsys.readouterr().out
    assert main(again) == 0
    assert str(large) in loaded  # what measures for the alarm starts where the warmed-up one did
    other = write_model(tmp_path / "other", vocabulary=259)
    for more in ((), ("--dry-run",)):
        assert main(arguments(given, tmp_path / "a", *more, discriminator=other)) == 2
        assert "has other tokens than the student" in capsys.readouterr().err
    assert main(arguments({**given, "model": straight}, tmp_path / "b", discriminator=large)) == 2
    assert "has a warmed-up one" in capsys.readouterr().err


def test_a_dry_run_counts_updates_tokens_and_memory(given, tmp_path, capsys):
    assert main(arguments(given, tmp_path / "run", "--dry-run", steps="0 0", kl=0.1)) == 0
    told = capsys.readouterr().out
    train = len((given["teacher"] / "train.jsonl").read_text().splitlines())
    assert f"{train // 4 * 2:,}" in told.split("updates of the adversarial stage")[1].splitlines()[0]
    assert "reference of the KL term" in told
    assert "fresh discriminator" not in told
    fresh = arguments(given, tmp_path / "run", "--dry-run", eval_every=1, fresh_steps=5)
    assert main(fresh) == 0
    assert "fresh discriminator, at evaluations" in capsys.readouterr().out
    missing = {"model": "nobody/nothing-7b", "teacher": tmp_path / "none"}
    assert main(arguments(missing, tmp_path / "run", "--dry-run")) == 0
    assert "counted once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("x.jsonl",)}, "teacher"),
        ({"teacher": None}, "teacher"),
        ({"batch_size": 5}, "even"),
        ({"band": (0.8, 0.6)}, "two rising"),
        ({"band": (0.6, 0.8), "eval_every": 0}, "eval_every"),
        ({"generations": 1}, "generations"),
        ({"fresh_steps": 2, "eval_every": 0}, "fresh_steps"),
        ({"reward": "frozen", "band": (0.6, 0.8)}, "frozen"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{"model": "m", "teacher": Path("t"), **changes})


def test_what_is_missing_is_told(given, tmp_path, capsys):
    assert main(arguments({**given, "teacher": tmp_path}, tmp_path / "a")) == 2
    assert "train.jsonl: missing" in capsys.readouterr().err
    assert main(arguments(given, tmp_path / "b", batch_size=400)) == 2
    assert "fewer than one update takes (400)" in capsys.readouterr().err
    assert main(arguments(given, tmp_path / "c", max_lengths="3 8")) == 2
    assert "no row is left to train on" in capsys.readouterr().err


def test_gauge_compares_students_with_the_first(given, straight, tmp_path, capsys):
    models = [str(given["model"]), str(straight / "model")]
    asked = ["gauge", *models, "--teacher", str(given["teacher"]), "-o", str(tmp_path / "g"), "--split", "validation"]
    assert main([*asked, "--samples", "2", "--temperatures", "1.0", "0.5"]) == 0
    summary = json.loads((tmp_path / "g" / "summary.json").read_text())
    figures, differences = summary["tables"]
    assert [row[0] for row in figures["rows"]] == ["student T=1", "student T=0.5", "run T=1", "run T=0.5", "teacher"]
    assert [row[0] for row in differences["rows"]] == ["student T=0.5", "run T=1", "run T=0.5"]
    other = tmp_path / "other"
    shutil.copytree(given["teacher"], other)
    (other / "teacher.json").write_text(json.dumps({"model": "gpt-5"}))
    capsys.readouterr()
    assert main(["gauge", models[0], "--teacher", str(other), "-o", str(tmp_path / "h")]) == 2
    assert "its teacher is gpt-5" in capsys.readouterr().err


def test_the_recipes_are_valid_and_say_what_they_cost(tmp_path, capsys):
    recipes = Path(__file__).parents[2] / "recipes"
    assert main(["run", str(recipes / "gad-lmsys.yaml"), "--out", str(tmp_path / "a"), "--dry-run"]) == 0
    assert "57.48 GiB, whole on each rank (3,085,938,688 parameters)" in capsys.readouterr().out
    assert main(["run", str(recipes / "gad-tiny.yaml"), "--out", str(tmp_path / "b"), "--dry-run"]) == 0
    assert "05-gad: distill, settings are valid" in capsys.readouterr().out
