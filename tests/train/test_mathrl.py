"""Reinforcement learning on mathematics: the loss, the rewards, the rollouts, and whole runs."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOTrainer

from luthier.cli.main import main
from luthier.core.errors import ConfigError, DataError
from luthier.data.replies import learned_rows
from luthier.data.row_source import open_rows
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import quiet_libraries
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, save_pretrained
from luthier.tasks import grading
from luthier.tasks.grading import Grader
from luthier.tasks.task import Problem
from luthier.train.marking import Marker, shares
from luthier.train.math_trainer import MathTrainer, make_trainer, prompt_order, updates_of, without_padding
from luthier.train.mathrl import questions_of
from luthier.train.policy_loss import LARGEST_KL, group_advantages, informative, k3, policy_loss
from luthier.train.rollouts import Question, sample, vocabulary_of
from luthier.train.tuning_configs import MathRLConfig

CLIP = (0.2, 0.2, 3.0)
SETTINGS = {
    "batch-size": 4,
    "rollout-prompts": 4,
    "generations": 4,
    "micro-batch-size": 8,
    "steps": 4,
    "learning-rate": 3e-4,
    "precision": "fp32",
    "log-every": 1,
    "checkpoint-every": 100,
}


def make_start(folder: Path) -> dict[str, Path]:
    """A model folder, and questions as rows."""
    draw = random.Random(0)
    asked = [{"prompt": f"{digit}?", "answer": str(digit), "kind": "exact"} for digit in range(10)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    rows = [
        {
            "prompt": row["prompt"],
            "completion": f"Answer: {draw.choice([row['answer'], draw.randrange(10)])}",
        }
        for row in asked * 10
    ]
    tokenizer = train_bpe((json.dumps(row) for row in rows), 280)
    model = InstellaForCausalLM(
        InstellaConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    initialize(model, 0)
    learned, _ = learned_rows(tokenizer, rows, 64, "rows")
    longest = max(len(row["input_ids"]) for row in learned)
    ids, labels = (
        torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in learned])
        for name, fill in (("input_ids", 1), ("labels", -100))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model, tokenizer, folder / "model", {"verb": "test"})
    return {"model": folder / "model", "data": folder / "questions.jsonl"}


def arguments(given: dict[str, Path], out: Path, **changes: object) -> list[str]:
    """The command line of a run of four updates."""
    settings = {**SETTINGS, **given, "out": out, **{k.replace("_", "-"): v for k, v in changes.items()}}
    command = ["mathrl", "--max-lengths", "32", "12"]
    for key, value in settings.items():
        command += [f"--{key}", *([] if value is True else str(value).split())]
    return command


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A model that half knows, and its questions."""
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    """Four updates, two on each rollout, with evaluations before and after."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(given, out, rollout_prompts=8, held_out=3)) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    a, b = weights(first), weights(second)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def metrics(out: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


# The loss


def scalar_token_loss(logprob: float, old: float, reference: float, advantage: float, kl: float) -> float:
    """Section 5.2 for one token, with numbers."""
    ratio = math.exp(logprob - old)
    clipped = min(max(ratio, 0.8), 1.2)
    loss = max(-ratio * advantage, -clipped * advantage)
    if advantage < 0:
        loss = min(loss, -3.0 * advantage)
    difference = reference - logprob
    return loss + kl * min(math.exp(difference) - difference - 1, 10.0)


def random_tokens(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(16, 9, generator=generator)
    old, reference = (logprobs + spread * torch.randn(16, 9, generator=generator) for _ in range(2))
    rewards = (torch.rand(4, 4, generator=generator) < 0.5).float()
    rewards[0] = 1.0  # a group without spread
    return logprobs, old, reference, rewards


def test_the_token_loss_is_that_of_the_paper():
    logprobs, old, reference, rewards = random_tokens(spread=2.0)
    advantages = group_advantages(rewards).flatten()[:, None]
    found = policy_loss(logprobs, old, advantages, CLIP) + 0.001 * k3(logprobs, reference)
    for row in range(16):
        for place in range(9):
            numbers = (part[row, place].item() for part in (logprobs, old, reference))
            expected = scalar_token_loss(*numbers, advantages[row, 0].item(), 0.001)
            assert found[row, place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ratio = (logprobs - old).exp()
    assert ((ratio > 3) & (advantages < 0)).any()  # the dual clip was at work


def test_advantages_are_normalised_inside_a_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages(rewards)[1].tolist() == [0.0] * 4
    assert informative(rewards).item() == 0.5


def test_a_group_without_spread_moves_nothing_but_towards_the_reference():
    logprobs, old, reference, _ = random_tokens()
    logprobs.requires_grad_()
    policy = policy_loss(logprobs, old, torch.zeros(16, 1), CLIP)
    (gradient,) = torch.autograd.grad(policy.sum(), logprobs)
    assert not gradient.any()
    divergence = k3(logprobs, reference)
    (gradient,) = torch.autograd.grad(divergence.sum(), logprobs)
    assert gradient.any()
    assert divergence.isfinite().all()


def test_k3_is_never_negative_and_finite_with_its_gradient_anywhere():
    logprobs = torch.tensor([-1.0, -1.0, -200.0, -0.001, -5.0], requires_grad=True)
    reference = torch.tensor([-1.0, -3.0, -0.001, -200.0, -1.0])
    found = k3(logprobs, reference)
    found.sum().backward()
    assert found.tolist()[0] == 0.0
    assert (found >= 0).all()
    assert found.max().item() == LARGEST_KL
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def made_trainer(given: dict[str, Path], folder: Path, marker: Marker, **changes: object) -> MathTrainer:
    settings = {"batch_size": 4, "rollout_prompts": 4, "generations": 4, "micro_batch_size": 8, "max_lengths": (32, 12)}
    config = MathRLConfig(
        **{**settings, "model": str(given["model"]), "data": ("x",), "out": folder, "steps": 2, "precision": "fp32"},
        **changes,
    )
    model, tokenizer = load_pretrained(given["model"], dtype=torch.float32), load_tokenizer(given["model"])
    rows = open_rows([str(given["data"])], ("answer",)).rows
    questions, _ = questions_of(tokenizer, rows, "", 32, "rows")
    with quiet_libraries():
        return make_trainer(config, model, tokenizer, questions, vocabulary_of(model, tokenizer), marker, dict, Ranks())


def scored_batch(trainer: MathTrainer, shift: float) -> dict:
    """A rollout with old and reference log-probabilities that differ a little from the model's."""
    trainer.model.train()
    rows = [{"prompt": str(number)} for number in range(4) for _ in range(4)]
    with quiet_libraries():
        batch = trainer._generate_and_score_completions(rows)
    generator = torch.Generator().manual_seed(0)
    noise = shift * torch.randn(batch["ref_per_token_logps"].shape, generator=generator)
    batch["old_per_token_logps"] = batch["ref_per_token_logps"] + noise
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] + 0.5 * noise
    return batch


@pytest.mark.parametrize("loss_mean", ["global", "micro-batch"])
def test_the_trainers_loss_is_trls_where_they_coincide(given, tmp_path, loss_mean):
    """The same tokens and advantages, without TRL's factor on the divergence; only its lack of a limit differs."""
    with Marker(Grader()) as marker:
        trainer = made_trainer(given, tmp_path, marker, loss_mean=loss_mean, kl=0.1)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        batch = scored_batch(trainer, shift=0.7)
        trainer.args.use_bias_correction_kl = False
        with quiet_libraries():
            theirs = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
            ours = trainer._compute_loss(trainer.model, batch)
    assert batch["advantages"].any()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(ours.item()) > 1e-3


def test_columns_that_are_padding_everywhere_change_nothing(given, tmp_path):
    with Marker(Grader()) as marker:
        trainer = made_trainer(given, tmp_path, marker)
        trainer.current_gradient_accumulation_steps = 1
        batch = scored_batch(trainer, shift=0.3)
        wide = dict(batch)
        for name, side in (("prompt", 0), ("completion", 1)):
            for part, fill in (("ids", 1), ("mask", 0)):
                pad = (0, 3) if side else (3, 0)
                wide[f"{name}_{part}"] = torch.nn.functional.pad(batch[f"{name}_{part}"], pad, value=fill)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            wide[name] = torch.nn.functional.pad(batch[name], (0, 3))
        with quiet_libraries():
            ours, theirs = (trainer._compute_loss(trainer.model, without_padding(part)) for part in (batch, wide))
            padded = trainer._compute_loss(trainer.model, wide)
    assert without_padding(wide)["completion_ids"].shape == batch["completion_ids"].shape
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)
    assert padded.item() == pytest.approx(ours.item(), abs=1e-6)


# Rewards


def test_verdicts_are_counted_apart():
    problems = [Problem(id=str(n), prompt="", answer=answer) for n, answer in enumerate(["7", "1/2", "7", "7"])]
    replies = ["So it is. Answer: 7", r"\boxed{0.5}", "Answer: 8", "7 it is, perhaps"]
    with Marker(Grader()) as marker:
        statuses = marker.statuses(replies, problems)
    assert statuses == ["correct", "correct", "wrong", "unparsed"]
    assert shares(statuses) == {"correct": 0.5, "wrong": 0.25, "unparsed": 0.25, "timeout": 0.0}


def test_a_checker_that_hangs_holds_training_up_for_its_deadline_only(given, tmp_path, monkeypatch):
    async def hang(self: object, gold: str, answer: str) -> bool:
        await asyncio.sleep(3600)
        return True

    class Process:
        stdin = None

        async def kill(self) -> None:
            return

        compare = hang

    async def start(memory: int) -> Process:
        return Process()

    monkeypatch.setattr(grading._Worker, "start", start)
    monkeypatch.setattr("luthier.train.marking.extract_answer", lambda reply: r"\int_0^1 x\,dx")
    with Marker(Grader(deadline=0.05)) as marker:
        trainer = made_trainer(given, tmp_path, marker, kl=0.0)
        trainer.questions = [Question(q.ids, replace(q.problem, kind="math")) for q in trainer.questions]
        began = time.perf_counter()
        with quiet_libraries():
            trainer.train()
        assert time.perf_counter() - began < 30
        assert trainer.state.global_step == 2
    (logged,) = [row for row in trainer.state.log_history if "loss" in row]
    assert logged["answers/timeout"] == 1.0
    assert logged["reward"] == 0.0


# Rollouts


def test_a_reply_does_not_depend_on_the_batch_and_keeps_its_end_token(given):
    model, tokenizer = load_pretrained(given["model"], dtype=torch.float32), load_tokenizer(given["model"])
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("1?", "what of 2, is it 2?", "3? or 4?")]
    prompts = [question.ids for question in questions_of(tokenizer, rows, "", 64, "rows")[0]]
    vocabulary = vocabulary_of(model, tokenizer)
    for temperature in (0.0, 1.0):
        together = sample(model, vocabulary, prompts, [1, 2, 3], max_tokens=10, temperature=temperature)
        alone = [
            sample(model, vocabulary, [prompt], [seed], max_tokens=10, temperature=temperature)[0]
            for prompt, seed in zip(prompts, [1, 2, 3], strict=True)
        ]
        assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    assert any(reply.tokens[-1] == tokenizer.eos_token_id for reply in together)
    assert all(len(reply.tokens) <= 10 for reply in together)


def test_long_prompts_are_left_out_and_the_suffix_is_asked(given):
    tokenizer = load_tokenizer(given["model"])
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "1?" * 40, "answer": "1"}]
    questions, dropped = questions_of(tokenizer, rows, " Think.", 40, "rows")
    assert dropped == 1
    assert tokenizer.decode(questions[0].ids).endswith("<|user|>\n1? Think.\n<|assistant|>\n")


def test_every_pass_has_its_own_order_of_all_questions():
    order = prompt_order(7, 14, 3)
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
    assert prompt_order(7, 10, 3) == order[:10]


def test_updates_are_counted_from_passes_or_given():
    config = MathRLConfig(model="m", data=("x",), batch_size=4, rollout_prompts=8, epochs=2.0)
    assert updates_of(config, 20) == 10
    with pytest.raises(DataError, match="fewer than a rollout"):
        updates_of(config, 3)


# Runs


def test_a_run_logs_its_rewards_and_says_what_changed(straight):
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    logged = {"reward", "informative_groups", "entropy", "kl", "clipped", "answers/unparsed", "answers/timeout"}
    first = [row for row in rows if "reward" in row]
    assert len(first) == 2  # one rollout has two updates
    assert all(logged <= set(row) for row in first)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-7)  # it starts as its own reference
    assert all("policy_loss" in row and "loss" not in row for row in rows)  # it is not in nats per token
    assert rows[-1]["kl"] > 0
    summary = json.loads((straight / "summary.json").read_text())
    (table,) = summary["tables"]
    assert [row[0] for row in table["rows"]] == ["pass@1", "pass@4", "greedy"]
    assert json.loads((straight / "model" / "luthier.json").read_text())["verb"] == "mathrl"


@pytest.mark.parametrize("stop", [1, 2], ids=["inside a rollout", "between rollouts"])
def test_a_stopped_run_resumes_to_the_same_weights_and_the_same_reference(given, straight, tmp_path, monkeypatch, stop):
    changes = {"rollout_prompts": 8, "held_out": 3}
    assert main(arguments(given, tmp_path / "run", stop_after=stop, **changes)) == 130
    references = []
    prepare = MathTrainer._frozen

    def remember(self: MathTrainer, reference: torch.nn.Module) -> object:
        references.append({name: value.clone() for name, value in reference.state_dict().items()})
        return prepare(self, reference)

    monkeypatch.setattr(MathTrainer, "_frozen", remember)
    assert main(arguments(given, tmp_path / "run", **changes)) == 0
    assert_same(straight, tmp_path / "run")
    rewards = [[row.get("reward") for row in metrics(out)] for out in (straight, tmp_path / "run")]
    assert rewards[0] == rewards[1]
    start = load_file(given["model"] / "model.safetensors")
    assert all(torch.equal(references[0][name], start[name]) for name in start)


def test_the_micro_batch_changes_nothing(given, straight, tmp_path):
    assert main(arguments(given, tmp_path / "run", rollout_prompts=8, held_out=3, micro_batch_size=4)) == 0
    assert_same(straight, tmp_path / "run", tolerance=1e-5)


def test_questions_may_be_chosen_by_how_often_the_start_solves_them(given, tmp_path):
    changes = {"keep_between": "0.25 0.75", "kl": 0.0, "truncated": "mask"}
    assert main(arguments(given, tmp_path / "run", **changes)) == 0
    solved = json.loads((tmp_path / "run" / "solved.json").read_text())["values"]
    kept = [count for count in solved if 1 <= count <= 3]
    assert 0 < len(kept) < len(solved) == 10
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["questions"] == len(kept)
    assert all("kl" not in row for row in metrics(tmp_path / "run"))


def test_adapters_are_merged_and_measured_on_the_way(given, tmp_path):
    assert main(arguments(given, tmp_path / "run", lora_rank=2, held_out=3, eval_every=2)) == 0
    before, after = load_file(given["model"] / "model.safetensors"), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert metrics(tmp_path / "run")[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    (row,) = metrics(tmp_path / "run", "eval")
    assert row["step"] == 2
    assert {"pass@1", "pass@4", "greedy"} <= set(row)


@pytest.mark.slow
def test_two_ranks_train_as_one(given, tmp_path, on_two_ranks):
    """Those that share the model sample by TRL, other replies than one rank; they go on from where they stopped."""
    changes = {"micro_batch_size": 4, "held_out": 3}
    rollouts = {"shard": True, "rollout_prompts": 8, **changes}
    assert main(arguments(given, tmp_path / "one", **changes)) == 0
    found = on_two_ranks(
        arguments(given, tmp_path / "whole", **changes),
        arguments(given, tmp_path / "half", **rollouts),
        arguments(given, tmp_path / "resumed", **rollouts, stop_after=1),
        arguments(given, tmp_path / "resumed", **rollouts),
    )
    assert [part["code"] for part in found] == [0, 0, 130, 0], [part["said"] for part in found]
    assert [part["held"] for part in found] == [[[1.0, 1.0]], [[0.5, 0.5]], [], [[0.5, 0.5]]]
    assert_same(tmp_path / "one", tmp_path / "whole", tolerance=1e-5)
    assert_same(tmp_path / "half", tmp_path / "resumed")
    names = ("one", "whole", "half", "resumed")
    one, whole, half, again = (json.loads((tmp_path / name / "summary.json").read_text())["tables"] for name in names)
    assert one == whole
    assert half == again
    assert [row[1] for row in half[0]["rows"]] == [row[1] for row in one[0]["rows"]]  # before


def test_a_dry_run_counts_questions(given, tmp_path, capsys):
    assert main([*arguments(given, tmp_path / "run"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["updates"]) == (10, 4)


def test_vllm_is_asked_for_by_name_and_missing_here(given, tmp_path, capsys):
    assert main(arguments(given, tmp_path / "run", vllm="colocate")) == 2
    assert "pip install vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rollout_prompts": 40}, "rollout_prompts"),
        ({"generations": 1}, "generations"),
        ({"clip": (0.2, 0.2, 1.1)}, "clip"),
        ({"keep_between": (0.8, 0.2)}, "keep_between"),
        ({"eval_every": 5}, "eval_every"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        MathRLConfig(model="m", data=("x",), **changes)
