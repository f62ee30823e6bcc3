from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.distill.gad_config import GADConfig
from luthier.distill.gad_trainer import DISCRIMINATOR_DIR
from luthier.distill.objective import group_advantages, length_residual
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config
from luthier.models.load import load_pretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # TRL asks for it
]


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing


def rollout(trainer, rows, seed=0, train=True):
    """What the student's update is computed from, after one rollout of `rows`, each sampled four times."""
    trainer.model.train(train)
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions([row for row in rows for _ in range(4)])


def unpadded(output, kind):
    """The ids of each row without padding."""
    pairs = zip(output[f"{kind}_ids"], output[f"{kind}_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in pairs]


def keep_scores(trainer, **changes):
    """What the discriminator says of each rollout from now on, as it says it; `changes` are handed on in its place."""
    kept, original = [], trainer.adversary.scored

    def scored(duels):
        kept.append(original(duels))
        return kept[-1]._replace(**changes)

    trainer.adversary.scored = scored
    return kept


def test_rewards_are_the_scores_before_the_discriminator_learns(make_trainer, duel_rows):
    trainer = make_trainer()
    before = copy.deepcopy(trainer.adversary.discriminator)
    output = rollout(trainer, duel_rows[:2])
    assert trainer.adversary.updates == 1
    after = trainer.adversary.scores(trainer._duels)[0]
    trainer.adversary.discriminator = before
    scores = trainer.adversary.scores(trainer._duels)[0]
    assert not torch.allclose(scores, after)
    torch.testing.assert_close(output["advantages"], group_advantages(scores, 4, eps=1e-4))
    assert output["advantages"].view(2, 4).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_rollout_is_run_once_for_rewards_and_update_to_the_same_weights(make_trainer, duel_rows, steps):
    """Two micro-batches: kept, they are run once an update; else once more."""
    kept = make_trainer(discriminator_steps=steps)
    again = make_trainer(discriminator_steps=steps, discriminator_kept_graphs=0)
    passes = [0, 0]
    for which, trainer in enumerate((kept, again)):
        trainer.adversary.discriminator.register_forward_hook(lambda *_, n=which: passes.__setitem__(n, passes[n] + 1))
        rollout(trainer, duel_rows[:2])
        assert trainer._scored is None  # its graphs are gone
    assert_same(weights(kept.adversary.discriminator), weights(again.adversary.discriminator))
    assert passes == [2 * steps, 4 * steps]


def test_what_is_scored_is_what_was_sampled_and_never_the_teacher(make_trainer, duel_rows):
    trainer = make_trainer()
    output = rollout(trainer, duel_rows[:2])
    sampled = [
        row[mask.bool()].tolist() for row, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    assert len(sampled) == 8 == len(output["advantages"])
    assert trainer._duels.students == sampled
    assert len(trainer._duels.teachers) == 2
    assert not any(reply in sampled for reply in trainer._duels.teachers)
    assert trainer._duels.prompts == unpadded(output, "prompt")


def test_the_students_batch_is_the_same_bit_for_bit_whether_the_discriminator_learns(make_trainer, duel_rows):
    learning, frozen = make_trainer(), make_trainer(discriminator_frozen=True)
    a, b = rollout(learning, duel_rows[:2]), rollout(frozen, duel_rows[:2])
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(torch.rand(3), _rand_after(frozen, duel_rows))  # nor did it draw random numbers
    assert (learning.adversary.updates, frozen.adversary.updates) == (1, 0)


def _rand_after(trainer, rows):
    rollout(trainer, rows[:2])
    return torch.rand(3)


def test_a_frozen_discriminator_does_not_move(make_trainer):
    trainer = make_trainer(discriminator_frozen=True)
    before, student = weights(trainer.adversary.discriminator), weights(trainer.model)
    trainer.train()
    assert_same(before, weights(trainer.adversary.discriminator))
    assert any(not torch.equal(student[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_training_moves_both_and_logs_what_the_paper_logs(make_trainer):
    trainer = make_trainer(discriminator_steps=3)
    before = weights(trainer.adversary.discriminator)
    trainer.train()
    assert trainer.adversary.updates == 6
    assert any(not torch.equal(before[name], t) for name, t in weights(trainer.adversary.discriminator).items())
    row = next(row for row in trainer.state.log_history if "discriminator/loss" in row)
    for name in ("accuracy", "student_score", "teacher_score", "grad_norm", "steps", "reencode_mismatch", "length_r2"):
        assert math.isfinite(row[f"discriminator/{name}"])


def test_an_evaluation_measures_and_does_not_train(make_trainer):
    trainer = make_trainer()
    before = weights(trainer.adversary.discriminator)
    trainer.evaluate()
    assert trainer.adversary.updates == 0
    assert_same(before, weights(trainer.adversary.discriminator))
    assert 0 <= trainer.state.log_history[-1]["eval_discriminator/accuracy"] <= 1


def test_groups_without_spread_move_nothing_and_are_counted(make_trainer, duel_rows):
    trainer = make_trainer(min_group_std=1e9)
    output = rollout(trainer, duel_rows[:2])
    assert not output["advantages"].any()
    assert trainer._metrics["train"]["discriminator/skipped_groups"] == [1.0]
    assert trainer.adversary.updates == 1  # the discriminator learns from them all the same


def test_equal_scores_give_no_advantage_at_all(make_trainer, duel_rows):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.adversary.discriminator.head.weight.zero_()
    assert not rollout(trainer, duel_rows[:2])["advantages"].any()


def test_the_kl_reference_is_the_warmed_up_student(make_trainer, student):
    trainer = make_trainer()
    assert_same(weights(student), weights(trainer.ref_model))
    with torch.no_grad():
        student.lm_head.weight.add_(0.1)  # trained on in memory, and not saved
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        make_trainer(model=student)
    make_trainer(model=student, beta=0.0)  # needs no reference


def test_a_student_from_nowhere_cannot_have_a_reference(make_trainer, student):
    with pytest.raises(ConfigError, match="beta"):
        make_trainer(model=LlamaForCausalLM(student.config.__class__(**_shape(student))))


def _shape(student):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(student.config, name) for name in names}


@pytest.mark.parametrize("saved_at", [1, 2])
def test_a_resumed_run_equals_a_straight_one(make_trainer, tmp_path, saved_at):
    def fresh(name):
        saving = {"save_steps": 1, "save_strategy": "steps", "output_dir": str(tmp_path / name)}
        return make_trainer(max_steps=3, **saving)

    straight = fresh("straight")
    straight.train()
    resumed = fresh("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{saved_at}"))
    assert_same(weights(straight.model), weights(resumed.model))
    assert_same(weights(straight.adversary.discriminator), weights(resumed.adversary.discriminator))
    assert resumed.adversary.updates == 3
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint-3" / DISCRIMINATOR_DIR / "optimizer.pt")
        for name in ("straight", "resumed")
    )
    assert all(torch.equal(ours["state"][i]["exp_avg"], theirs["state"][i]["exp_avg"]) for i in ours["state"])


def test_a_checkpoint_without_a_discriminator_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(save_steps=1, save_strategy="steps", max_steps=1)
    trainer.train()
    folder = tmp_path / "trainer" / "checkpoint-1"
    (folder / DISCRIMINATOR_DIR / "state.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(folder))


def test_accumulation_of_micro_batches_still_is_one_update_of_each(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 == trainer.adversary.updates
    assert len(trainer._duels.students) == 8


def test_controls_reward_what_they_say(make_trainer, duel_rows):
    by_length = make_trainer(adversarial_reward="length")
    output = rollout(by_length, duel_rows[:2])
    duels = by_length._duels
    expected = -(duels.student_lengths / duels.teacher_lengths[duels.owner]).log().abs()
    keep = expected.view(2, 4).std(1).repeat_interleave(4) > 1e-6
    torch.testing.assert_close(output["advantages"], group_advantages(expected, 4, eps=1e-4) * keep)
    noise = make_trainer(adversarial_reward="random")
    first, again = rollout(noise, duel_rows[:2])["advantages"], rollout(noise, duel_rows[:2])["advantages"]
    assert torch.equal(first, again)  # of seed and step, not of the global generator
    assert not torch.equal(first, output["advantages"])


def test_a_residual_reward_has_no_length_in_it(make_trainer, duel_rows):
    trainer = make_trainer(adversarial_reward="residual", max_completion_length=12)
    with torch.no_grad():
        trainer.model.lm_head.weight[trainer._tokenizer.eos_token_id] *= 40  # lengths must vary
    kept = keep_scores(trainer)
    output = rollout(trainer, duel_rows[:2])
    scores, lengths = kept[-1].scores[0], trainer._duels.student_lengths
    assert len(set(lengths.tolist())) > 2
    residual, explained = length_residual(scores, lengths, 4)
    torch.testing.assert_close(output["advantages"], group_advantages(residual, 4, eps=1e-4))
    assert trainer._metrics["train"]["discriminator/length_r2"] == [pytest.approx(explained.item(), abs=1e-6)]


def test_it_reads_respelled_text_when_asked(make_trainer, duel_rows):
    trainer = make_trainer(discriminator_reencode=True)
    output = rollout(trainer, duel_rows[:2])
    text = trainer._tokenizer.batch_decode
    sampled = [
        row[mask.bool()].tolist() for row, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ]
    assert text(trainer._duels.students) == text(sampled)
    assert trainer._duels.students != sampled  # a student with random weights spells at random
    assert trainer._metrics["train"]["discriminator/reencode_mismatch"][0] > 0


def test_tokens_are_credited_with_what_the_score_rises_by(make_trainer, duel_rows):
    trainer = make_trainer(adversarial_credit="tokens", discriminator_frozen=True)
    output = rollout(trainer, duel_rows[:2])
    rises, counted = trainer.adversary.rises(trainer._duels)
    advantages, width = output["advantages"], rises.shape[1]
    assert advantages.shape == output["completion_ids"].shape
    assert torch.equal(counted, output["completion_mask"][:, :width].bool())
    for group in (slice(0, 4), slice(4, 8)):
        known, found = rises[group][counted[group]], advantages[group, :width][counted[group]]
        expected = (known - known.mean()) / (known.std(correction=0) + 1e-4)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert advantages[:, width:].abs().sum() == 0
    assert advantages[:, :width][~counted].abs().sum() == 0


def test_token_credit_trains_and_evaluates_and_knows_no_other_rewards(make_trainer):
    trainer = make_trainer(adversarial_credit="tokens", eval_strategy="steps", eval_steps=1, top_entropy_quantile=0.5)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert any("eval_discriminator/accuracy" in row for row in trainer.state.log_history)
    with pytest.raises(ConfigError, match="adversarial_credit: other rewards"):
        make_trainer(adversarial_credit="tokens", trainer={"reward_funcs": [lambda completion_ids, **_: [0.0]]})


def test_a_lagging_discriminator_gets_more_updates_after_an_evaluation(make_trainer):
    band = [0.98, 0.99]
    trainer = make_trainer(discriminator_accuracy_band=band, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.log({"eval_discriminator/accuracy": 0.5})
    assert trainer.discriminator_steps == 2
    trainer.log({"eval_discriminator/accuracy": 1.0})
    assert trainer.discriminator_steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial_reward": "taste"}, "adversarial_reward"),
        ({"num_iterations": 2}, "num_iterations"),
        ({"adversarial_credit": "words"}, "adversarial_credit"),
        ({"adversarial_credit": "tokens", "adversarial_reward": "length"}, "got adversarial_reward 'length'"),
        ({"adversarial_credit": "tokens", "discriminator_reencode": True}, "discriminator_reencode True"),
        ({"discriminator_steps": 0}, "discriminator_steps"),
        ({"discriminator_accuracy_band": [0.9, 0.6], "eval_strategy": "steps"}, "two rising"),
        ({"discriminator_accuracy_band": [0.6, 0.9]}, "no evaluation"),
    ],
)
def test_impossible_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        GADConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_a_missing_column_is_told(make_trainer, duel_rows):
    trainer = make_trainer(teacher_column="answer")
    with pytest.raises(DataError, match="no column 'answer'"):
        rollout(trainer, duel_rows[:2])


def test_defaults_are_the_papers(tmp_path):
    config = GADConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    told = {
        "beta": 0.001,
        "temperature": 0.8,
        "max_grad_norm": 0.2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_completion_length": 1536,
        "max_prompt_length": 2048,
        "learning_rate": 1e-6,
        "discriminator_learning_rate": 1e-6,
        "discriminator_max_grad_norm": 0.2,
        "num_generations": 8,
        "epsilon": 0.2,
        "delta": 3.0,
        "scale_rewards": "group",
        "discriminator_steps": 1,
    }
    assert {name: getattr(config, name) for name in told} == told


def test_long_prompts_keep_their_end(make_trainer, duel_rows):
    trainer = make_trainer(max_prompt_length=2)
    full = trainer._tokenizer(duel_rows[0]["prompt"])["input_ids"]
    rollout(trainer, duel_rows[:2])
    assert trainer._duels.prompts[0] == full[-2:]
    assert trainer._metrics["train"]["prompts/truncated_ratio"] == [1.0]


def test_adapters_are_trls_own(make_trainer, student):
    from peft import LoraConfig

    before = weights(student)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(trainer={"peft_config": adapters}, max_steps=1)
    trainer.train()
    assert trainer.ref_model is None  # the base weights are
    trained = trainer.model.get_base_model().state_dict()
    assert torch.equal(trained["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert trainer.adversary.updates == 1


def test_an_instella_learns_too(make_trainer, tokenizer, tmp_path):
    config = sized_config("nano", tokenizer, max_position_embeddings=64)
    model = InstellaForCausalLM(config)
    initialize(model, 0)
    model.save_pretrained(tmp_path / "instella")
    trainer = make_trainer(model=load_pretrained(tmp_path / "instella"), max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.ref_model is not None
    assert not torch.equal(before["lm_head.weight"], trainer.model.state_dict()["lm_head.weight"])
    assert trainer.adversary.updates == 1


def test_further_rewards_are_added(make_trainer, duel_rows):
    def shortness(completion_ids, **columns):
        return [-float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(trainer={"reward_funcs": [shortness]}, reward_weights=[1.0, 0.5])
    rollout(trainer, duel_rows[:2])
    assert "rewards/shortness/mean" in trainer._metrics["train"]


def test_an_evaluation_with_one_sample_a_prompt_has_no_groups_to_leave_out(make_trainer, duel_rows):
    trainer = make_trainer(num_generations_eval=1, min_group_std=1e9)  # leaves out every group it looks at
    assert rollout(trainer, duel_rows[:2])["advantages"].abs().sum() == 0
    trainer.model.eval()
    trainer._generate_and_score_completions(duel_rows[:2])
    assert trainer._informative is None
