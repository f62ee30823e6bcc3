from __future__ import annotations

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.distill.alarms import ALARMS, FRESH, QUALITY, AlarmCallback, AlarmLimits, checkpoint_before, raised

LIMITS = AlarmLimits(window=3)
HEALTHY = {
    "completions/mean_length": 20.0,
    "completions/teacher_length": 20.0,
    "completions/unique_share": 0.9,
    "completions/clipped_ratio": 0.1,
    "entropy": 2.0,
    "kl": 0.01,
    "discriminator/student_score": 0.0,
    "discriminator/length_r2": 0.1,
}


def history(changes=None, evaluations=()):
    """Three healthy rows, then six with changes, then evaluations."""
    return [HEALTHY] * 3 + [{**HEALTHY, **(changes or {})}] * 6 + list(evaluations)


def test_a_healthy_run_raises_nothing():
    quality = [{"eval_discriminator/accuracy": 0.6 + 0.05 * i, QUALITY: 0.1 * i} for i in range(6)]
    assert raised(history(evaluations=quality), LIMITS) == {}
    assert raised([], LIMITS) == {}


UNSURE = [{"eval_discriminator/accuracy": 0.6}, {"eval_discriminator/accuracy": 0.45}]
BAD = {
    "length drift": history({"completions/mean_length": 26.0}),
    "lost diversity": history({"entropy": 0.9}),
    "more truncated": history({"completions/clipped_ratio": 0.25}),
    "unearned reward": history({"discriminator/student_score": 1.0}, UNSURE),
    "reward is length": history({"discriminator/length_r2": 0.6}),
    "KL jump": [*history(), {**HEALTHY, "kl": 0.05}],
    "quality is flat": history(evaluations=[{QUALITY: 0.5}, {QUALITY: 0.4}, {QUALITY: 0.5}, {QUALITY: 0.3}]),
    "fooled": history(evaluations=[{"eval_discriminator/accuracy": 0.6, FRESH: 0.95}]),
}


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_is_raised_by_its_sign_alone(name):
    found = raised(BAD[name], LIMITS)
    assert list(found) == [name]
    assert any(digit in found[name] for digit in "0123456789")


def test_replies_too_short_are_a_drift_too_and_unique_replies_count():
    assert "length drift" in raised(history({"completions/mean_length": 14.0}), LIMITS)
    assert "unique replies" in raised(history({"completions/unique_share": 0.3}), LIMITS)["lost diversity"]


def test_a_reward_that_rises_with_accuracy_is_earned():
    surer = [{"eval_discriminator/accuracy": 0.6}, {"eval_discriminator/accuracy": 0.7}]
    assert raised(history({"discriminator/student_score": 1.0}, surer), LIMITS) == {}


def test_checkpoints_that_are_whole_and_earlier_count(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()  # cut short
    assert checkpoint_before(tmp_path, 10).name == "checkpoint-4"
    assert checkpoint_before(tmp_path, 2) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL asks for it
def test_an_alarm_rolls_back_lowers_the_rate_and_adds_steps(make_trainer):
    saved = {"save_steps": 1, "save_strategy": "steps", "max_steps": 3}
    trainer = make_trainer(**saved)
    told = list[str]()
    limits = AlarmLimits(window=1, length_r2=-1.0)  # always raised; quiet for a window afterwards
    callback = AlarmCallback(trainer, limits=limits, tell=told.append)
    trainer.add_callback(callback)
    kept = {}

    def roll_back(folder, original=trainer.roll_back):
        original(folder)
        kept.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, folder=folder)

    trainer.roll_back = roll_back
    trainer.train()
    assert any("no checkpoint to roll back to" in words for words in told)
    assert told[-1].endswith(kept["folder"].name)
    assert trainer.discriminator_steps > 2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-3 * 0.5 ** len({step for step, *_ in callback.told})
    )
    from safetensors.torch import load_file

    saved_weights = load_file(kept["folder"] / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved_weights.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_alarm_may_stop_the_run(make_trainer):
    trainer = make_trainer(max_steps=5)
    trainer.add_callback(
        AlarmCallback(trainer, limits=AlarmLimits(window=1, length_r2=-1.0), actions=["stop"], tell=lambda words: None)
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_unknown_actions_are_refused(make_trainer):
    with pytest.raises(ConfigError, match="panic"):
        AlarmCallback(make_trainer(), actions=["panic"])
