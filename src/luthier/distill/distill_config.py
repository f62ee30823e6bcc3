"""Settings of `luthier distill`: one student through warm-up, gate and GAD. The defaults are the paper's. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from luthier.core.checks import above, at_least, expect, inside
from luthier.learn.tuning_config import TuningConfig

Action = Literal["stop", "roll_back", "lower_rate", "add_steps"]
KEPT = 2  # training states: an alarm may go back to the one before the newest


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distill a teacher's collected replies into a student with a discriminator that learns along (GAD).

    Warm-up, gate and adversarial stage, each of which resumes. Writes model/, warmup/ and gad/.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/distill")
    """Run folder; running the same command again resumes it."""
    model: str
    """The student: a model folder or hub id; or the folder of another distill run, to begin after its warm-up."""
    discriminator: str | None = None
    """What the discriminator starts from: a model folder or hub id with the student's tokenizer; default: the student.
    A larger one knows more."""
    teacher: Path | None = None
    """Folder of `luthier collect`: its train.jsonl is learned, its validation.jsonl is held out, test.jsonl is not
    read."""
    data: tuple[str, ...] = ()
    """In place of `teacher`: files or hub ids with rows of kind completion (prompt and the teacher's reply)."""
    held_out: float = 0.05
    """Share of the prompts of `data` that neither network learns from."""
    raw: bool = False
    """Prompts are texts to continue, without chat format."""
    seed: int = 6198
    """Decides data order and samples."""
    batch_size: int = 256
    """Prompts per update, over all ranks."""
    micro_batch_size: int = 8
    """Sequences of one rank in one forward pass, of both networks."""
    epochs: tuple[float, float] = (1.0, 2.0)
    """Passes over the prompts: of the warm-up, and of the adversarial stage."""
    steps: tuple[int, int] = (0, 0)
    """Updates of the two stages; 0: as many as the epochs have."""
    learning_rate: float = 1e-6
    """The student's in the adversarial stage, AdamW, constant."""
    warmup_learning_rate: float = 1e-6
    """The student's in the warm-up."""
    discriminator_learning_rate: float = 1e-6
    """The discriminator's in both."""
    discriminator_alone: int = 10
    """First updates of the warm-up, in which the student does not learn yet."""
    grad_clip: float = 0.2
    """Largest L2 norm of either network's gradient."""
    max_lengths: tuple[int, int] = (2048, 1536)
    """Most tokens of a prompt (longer ones are left out) and of a reply (cut)."""
    generations: int = 8
    """Replies that the student samples for each prompt."""
    temperature: float = 0.8
    """Of these samples."""
    kl: float = 0.001
    """Weight of the divergence from the warmed-up student."""
    reward: Literal["discriminator", "residual", "length", "random", "frozen"] = "discriminator"
    """residual: the score without what length explains in a group. Controls: length and random, without a gate; frozen:
    the score of a discriminator that does not learn in the adversarial stage, which collapses."""
    discriminator_steps: int = 1
    """Updates of the discriminator for each rollout."""
    band: tuple[float, ...] = ()
    """Two accuracies such as 0.6 0.8: after each evaluation one more or one fewer of these updates where the held-out
    accuracy is below or above."""
    fresh_steps: int = 0
    """Updates of a discriminator that begins anew at each evaluation, for the alarm that the live one is fooled; 0:
    none, and no memory for it."""
    margin: float = 0.05
    """Gate: by how much the discriminator has to beat length and n-grams on held-out prompts."""
    force: bool = False
    """Go on even if the gate is shut."""
    on_alarm: tuple[Action, ...] = ("roll_back", "lower_rate", "add_steps")
    """What is done, in this order, when a sign of reward hacking is seen; empty: it is only told."""
    vllm: Literal["off", "colocate", "server"] = "off"
    """Let vLLM sample: in this process, or on TRL's server."""
    lora_rank: int = 0
    """Train low-rank adapters of the student and merge them after each stage; 0: all weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bf16 over fp32 weights; auto takes it where this machine multiplies it faster."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, of both networks: less memory, about a third more time."""
    shard: bool = False
    """Under torchrun: FSDP2 for the student. The discriminator is whole on each rank."""
    device: str = "auto"
    """cpu, cuda or auto."""
    log_every: int = 10
    """Updates between rows of training metrics."""
    checkpoint_every: int = 50
    """Updates between training states, of which the newest two are kept."""
    eval_every: int = 50
    """Updates between measurements on held-out prompts; 0: only before and after the adversarial stage."""
    stop_after: int = 0
    """Save and stop after this many updates of this process; 0: never. For time-limited jobs."""

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (
        "out",
        "device",
        "stop_after",
        "log_every",
        "checkpoint_every",
        "micro_batch_size",
        "activation_checkpointing",
        "shard",
        "margin",
        "force",
        "on_alarm",
    )
    """Settings that may differ when a run is resumed."""

    def __post_init__(self) -> None:
        expect(self, "teacher", (self.teacher is None) == bool(self.data), "either teacher or data, and not both")
        rates = ("learning_rate", "warmup_learning_rate", "discriminator_learning_rate")
        above(self, 0, "batch_size", "micro_batch_size", *rates, "grad_clip", "log_every", "checkpoint_every")
        counts = ("discriminator_alone", "fresh_steps", "lora_rank", "eval_every", "stop_after", "seed")
        at_least(self, 0, *counts, "kl", "margin")
        expect(self, "batch_size", self.batch_size % 2 == 0, "an even number")
        inside(self, 0, 1, "held_out")
        expect(self, "epochs", min(self.epochs) > 0, "more than 0")
        expect(self, "steps", min(self.steps) >= 0, "0 or more")
        expect(self, "max_lengths", min(self.max_lengths) > 0, "more than 0")
        expect(self, "generations", self.generations > 1, "at least 2")
        above(self, 0, "temperature")
        expect(self, "discriminator_steps", self.discriminator_steps > 0, "at least 1; reward frozen is for none")
        expect(self, "fresh_steps", not self.fresh_steps or self.eval_every > 0, "0 without evaluations (eval_every)")
        self._check_band()

    def _check_band(self) -> None:
        if not self.band:
            return
        rising = len(self.band) == 2 and 0.5 <= self.band[0] < self.band[1] <= 1
        expect(self, "band", rising, "two rising accuracies from 0.5 to 1")
        expect(self, "band", self.eval_every > 0, "eval_every above 0 with it: accuracy is measured then")
        expect(self, "band", self.reward != "frozen", "none where the discriminator is frozen")

    @property
    def has_gate(self) -> bool:
        """Whether the reward is what the discriminator knows, so that it has to know something."""
        return self.reward not in ("length", "random")

    def warm_up(self) -> TuningConfig:
        """The warm-up as a stage on a trainer, with a sequence for each prompt."""
        return self._stage("warmup", self.model, self.batch_size, 0, self.warmup_learning_rate)

    def adversarial(self, start: str) -> TuningConfig:
        """The adversarial stage from a warmed-up model, with `generations` sequences for each prompt."""
        return self._stage("gad", start, self.batch_size * self.generations, 1, self.learning_rate)

    def _stage(self, name: str, model: str, sequences: int, which: int, rate: float) -> TuningConfig:
        shared = (
            "seed",
            "micro_batch_size",
            "grad_clip",
            "lora_rank",
            "precision",
            "activation_checkpointing",
            "shard",
            "device",
            "log_every",
            "checkpoint_every",
            "eval_every",
            "stop_after",
        )
        return TuningConfig(
            out=self.out / name,
            model=model,
            batch_size=sequences,
            epochs=self.epochs[which],
            steps=self.steps[which],
            learning_rate=rate,
            schedule="constant",
            warmup=0.0,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            keep_checkpoints=KEPT,
            **{field: getattr(self, field) for field in shared},
        )
