"""Signs that the student games its discriminator, and what is done then (§8.6).

Each alarm reads the Trainer's history (`state.log_history`: a row of numbers per logged step, `eval_` before those of
evaluations) and says in words what is wrong, or None. A number that was not logged raises no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from luthier.core.errors import ConfigError
from luthier.distill.gad_trainer import ACCURACY, GADTrainer

Row = Mapping[str, Any]
ACTIONS = ("stop", "roll_back", "lower_rate", "add_steps")
QUALITY, FRESH = "eval_matched_quality", "eval_fresh_accuracy"


@dataclass(frozen=True, kw_only=True)
class AlarmLimits:
    """When to raise an alarm."""

    window: int = 10
    """Logged rows that count as now, and as the start."""
    length_drift: float = 0.25
    """Mean length off the teacher's by this share."""
    diversity: float = 0.5
    """Unique replies or entropy under this share of the start's."""
    truncated: float = 0.1
    """Share of cut replies above the start's by this much."""
    flat_accuracy: float = 0.01
    """Rise of held-out accuracy that counts as none."""
    length_r2: float = 0.5
    """Share of the reward's spread that length explains."""
    kl_jump: float = 3.0
    """KL over this many times its median before."""
    quality_patience: int = 3
    """Evaluations without a better validation quality at matched length."""
    fresh_accuracy: float = 0.9
    """Held-out accuracy of a discriminator trained from scratch, where the live one has less."""


def series(history: Sequence[Row], name: str) -> list[float]:
    """All values of a number, in order."""
    return [float(row[name]) for row in history if row.get(name) is not None]


def length_drift(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """Replies much longer or shorter than the teacher's."""
    mine, theirs = _now(history, "completions/mean_length", limits), _now(history, "completions/teacher_length", limits)
    if mine is None or not theirs or abs(mine / theirs - 1) <= limits.length_drift:
        return None
    return f"replies are {mine:.1f} tokens long, the teacher's {theirs:.1f}"


def lost_diversity(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """Unique replies or entropy halved."""
    for name, words in (("completions/unique_share", "the share of unique replies"), ("entropy", "entropy")):
        now, start = _now(history, name, limits), _start(history, name, limits)
        if now is not None and start is not None and now < limits.diversity * start:
            return f"{words} fell from {start:.3f} to {now:.3f}"
    return None


def more_truncated(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """More replies cut at the limit."""
    name = "completions/clipped_ratio"
    now, start = _now(history, name, limits), _start(history, name, limits)
    if now is None or start is None or now - start <= limits.truncated:
        return None
    return f"{now:.0%} of the replies are cut at the limit, {start:.0%} at the start"


def unearned_reward(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """Reward rises while held-out accuracy is under a half or stays where it was."""
    now, start = (
        _now(history, "discriminator/student_score", limits),
        _start(history, "discriminator/student_score", limits),
    )
    accuracy = series(history, f"eval_{ACCURACY}")
    if now is None or start is None or now <= start or len(accuracy) < 2:
        return None
    if accuracy[-1] >= 0.5 and abs(accuracy[-1] - accuracy[0]) > limits.flat_accuracy:
        return None
    went = f"held-out accuracy went from {accuracy[0]:.3f} to {accuracy[-1]:.3f}"
    return f"reward rose from {start:.3f} to {now:.3f}, {went}"


def reward_is_length(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """Length explains most of the reward."""
    now = _now(history, "discriminator/length_r2", limits)
    return None if now is None or now <= limits.length_r2 else f"length explains {now:.0%} of the reward"


def kl_jump(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """The student leaves its reference all at once."""
    values = series(history, "kl")
    if len(values) <= limits.window:
        return None
    before = median(values[-1 - limits.window : -1])
    if before <= 0 or values[-1] <= limits.kl_jump * before:
        return None
    return f"KL to the reference jumped from {before:.4f} to {values[-1]:.4f} nats per token"


def quality_is_flat(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """Validation quality at matched length has stopped rising; `auditor` logs it."""
    values = series(history, QUALITY)
    recent = values[-limits.quality_patience :]
    if len(values) <= limits.quality_patience or max(recent) > max(values[: -limits.quality_patience]):
        return None
    return f"no better quality at matched length in {limits.quality_patience} evaluations"


def fooled(history: Sequence[Row], limits: AlarmLimits) -> str | None:
    """A fresh discriminator tells the samples apart better than the live one; `auditor` trains it."""
    fresh, live = series(history, FRESH), series(history, f"eval_{ACCURACY}")
    if not fresh or not live or fresh[-1] < limits.fresh_accuracy or live[-1] >= fresh[-1]:
        return None
    return f"a fresh discriminator reaches an accuracy of {fresh[-1]:.3f}, the live one has {live[-1]:.3f}"


Alarm = Callable[[Sequence[Row], AlarmLimits], str | None]
ALARMS: dict[str, Alarm] = {
    "length drift": length_drift,
    "lost diversity": lost_diversity,
    "more truncated": more_truncated,
    "unearned reward": unearned_reward,
    "reward is length": reward_is_length,
    "KL jump": kl_jump,
    "quality is flat": quality_is_flat,
    "fooled": fooled,
}


def raised(history: Sequence[Row], limits: AlarmLimits) -> dict[str, str]:
    """The alarms of a history, by name, with what is wrong."""
    found = {name: alarm(history, limits) for name, alarm in ALARMS.items()}
    return {name: words for name, words in found.items() if words is not None}


def _now(history: Sequence[Row], name: str, limits: AlarmLimits) -> float | None:
    """Mean over the last rows; None until there is a full window."""
    values = series(history, name)[-limits.window :]
    return fmean(values) if len(values) == limits.window else None


def _start(history: Sequence[Row], name: str, limits: AlarmLimits) -> float | None:
    """Mean over the first rows; None until there are later ones that do not overlap with them."""
    values = series(history, name)
    return fmean(values[: limits.window]) if len(values) >= 2 * limits.window else None


class AlarmCallback(TrainerCallback):
    """Looks at the history at every log, and acts when alarms are raised: all of `actions`, in their order.

    roll_back: student, discriminator and optimizers as in the newest checkpoint before this step; lower_rate: the
    student's learning rate times `factor`; add_steps: one more update of the discriminator per rollout; stop: the run
    ends. After acting, a full window has to pass. Alarms are kept in `told` and handed to `tell`.
    """

    def __init__(
        self,
        trainer: GADTrainer,
        *,
        limits: AlarmLimits | None = None,
        actions: Sequence[str] = ("roll_back", "lower_rate", "add_steps"),
        factor: float = 0.5,
        tell: Callable[[str], None] = print,
    ) -> None:
        if unknown := set(actions) - set(ACTIONS):
            raise ConfigError(f"actions: got {sorted(unknown)}", hint=f"expected some of {', '.join(ACTIONS)}")
        self.trainer, self.limits, self.actions, self.factor = trainer, limits or AlarmLimits(), actions, factor
        self.tell = tell
        self.told = list[tuple[int, str, str]]()
        self._quiet_until = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise alarms, and act on them."""
        found = raised(state.log_history, self.limits)
        if not found or state.global_step < self._quiet_until:
            return
        self._quiet_until = state.global_step + self.limits.window * max(1, int(args.logging_steps))
        for name, words in found.items():
            self.told.append((state.global_step, name, words))
            self._say(state, f"{name}: {words}")
        for action in self.actions:
            self._act(action, state, control)

    def _say(self, state: TrainerState, words: str) -> None:
        if state.is_world_process_zero:
            self.tell(f"step {state.global_step}: {words}")

    def _act(self, action: str, state: TrainerState, control: TrainerControl) -> None:
        if action == "stop":
            control.should_training_stop = True
        elif action == "add_steps":
            self.trainer.discriminator_steps += 1
        elif action == "lower_rate":
            self.trainer.scale_learning_rate(self.factor)
        else:
            folder = checkpoint_before(Path(str(self.trainer.args.output_dir)), state.global_step)
            if folder is None:
                self._say(state, "there is no checkpoint to roll back to")
            else:
                self.trainer.roll_back(folder)
                self._say(state, f"rolled back to {folder.name}")


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest whole checkpoint of an earlier step."""
    found = {
        int(path.parent.name.split("-")[1]): path.parent
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
    }
    earlier = [number for number in found if number < step]
    return found[max(earlier)] if earlier else None
