"""The two stages of GAD inside run folders: trainers with this package's prompts and learning rates, resumed by `fit`.

Departure: both stages begin with fresh optimizers, where the reference carries them over.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.console import Console
from luthier.core.errors import DataError, UserError
from luthier.core.run import RunFolder
from luthier.distill.alarms import ALARMS, AlarmCallback
from luthier.distill.auditor import Auditor
from luthier.distill.discriminator import Discriminator
from luthier.distill.distill_config import DistillConfig
from luthier.distill.gad_config import GADConfig, WarmupConfig
from luthier.distill.gad_trainer import GADTrainer
from luthier.distill.lessons import Encode, Lessons
from luthier.distill.warmup import WarmupTrainer
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Paced, Tuned, arguments, fit, lora, newest_checkpoint, quiet_libraries, step_of
from luthier.learn.tuning_config import TuningConfig


class Alarmed(UserError):
    """The run was stopped because the student games its discriminator."""


class _Prompted(Paced):
    """Mixed into a trainer: its prompts become ids as everywhere in this package."""

    def __init__(self, *args: Any, encode: Encode, **kwargs: Any) -> None:
        self.encode = encode
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.encode(prompt) for prompt in prompts], None, {}


class PacedWarmup(_Prompted, WarmupTrainer):
    """The warm-up's trainer."""


class PacedGAD(_Prompted, GADTrainer):
    """The adversarial stage's trainer."""


def warmup_trainer(
    config: DistillConfig,
    model: PreTrainedModel,
    discriminator: Discriminator,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Lessons,
    who: Ranks,
) -> PacedWarmup:
    """A trainer that teaches `model` the replies, and `discriminator` to tell them from the model's samples."""
    pace = config.warm_up()
    settings = _shared(config) | {"discriminator_only_steps": config.discriminator_alone}
    with quiet_libraries():
        return PacedWarmup(
            model,
            discriminator,
            arguments(WarmupConfig, pace, who, **settings),
            **_given(pace, config.batch_size, model, tokenizer, lessons),
        )


def gad_trainer(
    config: DistillConfig,
    model: PreTrainedModel,
    discriminator: Discriminator,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Lessons,
    who: Ranks,
) -> PacedGAD:
    """A trainer that rewards `model`, loaded from the warm-up's folder, with what `discriminator` says."""
    pace = config.adversarial(str(model.config._name_or_path))
    settings = _shared(config) | {
        "num_generations": config.generations,
        "beta": config.kl,
        "adversarial_reward": "discriminator" if config.reward == "frozen" else config.reward,
        "discriminator_frozen": config.reward == "frozen",
        "discriminator_accuracy_band": list(config.band) or None,
    }
    with quiet_libraries():
        return PacedGAD(
            model,
            discriminator,
            arguments(GADConfig, pace, who, **settings),
            **_given(pace, config.batch_size, model, tokenizer, lessons),
        )


def _shared(config: DistillConfig) -> dict[str, Any]:
    """What both trainers are told, in the names of their settings."""
    return {
        "num_generations_eval": 1,
        "max_prompt_length": None,  # longer ones have been left out
        "max_completion_length": config.max_lengths[1],
        "temperature": config.temperature,
        "disable_dropout": True,
        "discriminator_learning_rate": config.discriminator_learning_rate,
        "discriminator_max_grad_norm": config.grad_clip,
        "discriminator_steps": config.discriminator_steps,
        "use_vllm": config.vllm != "off",
        "vllm_mode": config.vllm if config.vllm != "off" else "colocate",
    }


def _given(
    pace: TuningConfig, prompts: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lessons: Lessons
) -> dict[str, Any]:
    """What both trainers are made with; `prompts` is how many an update takes."""
    if len(lessons.train) < prompts:
        raise DataError(
            f"{len(lessons.train)} rows, fewer than one update takes ({prompts})",
            hint="collect more replies, or lower batch_size",
        )
    return {
        "train_dataset": Dataset.from_list(lessons.train),
        "eval_dataset": Dataset.from_list(lessons.held_out),
        "processing_class": tokenizer,
        "peft_config": lora(model, pace),
        "encode": lessons.encode,
        "pace": pace,
    }


def learn(
    trainer: PacedWarmup | PacedGAD, stop_after: int, run: RunFolder | None, who: Ranks, console: Console
) -> tuple[Tuned, int]:
    """Train to the end, or for `stop_after` updates (0: no limit); the outcome, and how many were made here."""
    last = newest_checkpoint(Path(str(trainer.args.output_dir)))
    tuned = fit(trainer, replace(trainer.pace, stop_after=stop_after), run, who, console)
    return tuned, tuned.step - (step_of(last) if last is not None else 0)


def play(
    config: DistillConfig,
    trainer: PacedGAD,
    auditor: Auditor,
    stop_after: int,
    run: RunFolder | None,
    who: Ranks,
    console: Console,
) -> tuple[Tuned, int]:
    """The adversarial stage with its alarms; returns as `learn`. What is seen and done goes to rows of kind alarm.

    `auditor` measures what some of them look at, after each evaluation.

    Raises: Alarmed when an alarm stopped it.
    """

    def tell(words: str) -> None:
        console.status(words)
        if run is not None:
            text = words.partition(": ")[2]
            name = text.partition(": ")[0] if text.partition(": ")[0] in ALARMS else ""  # else what was done about it
            run.log("alarm", step=trainer.state.global_step, name=name, text=text)

    alarms = AlarmCallback(trainer, actions=config.on_alarm, tell=tell)
    trainer.add_callback(alarms)
    trainer.add_callback(auditor)
    tuned, made = learn(trainer, stop_after, run, who, console)
    last = alarms.told[-1] if alarms.told else (0, "", "")
    if not tuned.finished and "stop" in config.on_alarm and last[0] == tuned.step:
        raise Alarmed(
            f"stopped by an alarm at step {tuned.step} of {tuned.total}: {last[1]}: {last[2]}",
            hint="the last training state is kept; go on with other --on-alarm, or begin again with a lower rate",
        )
    return tuned, made
