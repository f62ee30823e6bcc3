"""Settings of the stages after pretraining: sft, dpo, mathrl. The defaults are the paper's. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.core.checks import expect
from luthier.learn.tuning_config import TuningConfig


@dataclass(frozen=True, kw_only=True)
class SftConfig(TuningConfig):
    """Fine-tune a model on conversations; only the replies are learned (Instella, section 3.1)."""

    out: Path = Path("runs/sft")
    """Run folder; running the same command again resumes it."""
    data: tuple[str, ...]
    """Files or hub ids with rows of kind messages, or prompt and completion."""
    held_out: float = 0.02
    """Share of the questions that is kept for evaluation."""
    max_length: int = 4096
    """Longer conversations are cut on the right."""
    epochs: float = 3.0
    """Passes over the data."""
    loss_mean: Literal["global", "per-rank"] = "global"
    """global: one mean over all learned tokens of an update; per-rank: the reference's, a mean of the ranks' means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "max_length", self.max_length > 1, "more than 1")
        expect(self, "held_out", 0 <= self.held_out < 1, "0 to less than 1")
        expect(self, "data", bool(self.data), "at least one corpus")


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TuningConfig):
    """Make a model prefer one reply to another: DPO on mean log-probabilities (Instella, section 3.2)."""

    out: Path = Path("runs/dpo")
    """Run folder; running the same command again resumes it."""
    data: tuple[str, ...]
    """Files or hub ids with rows of kind preference: prompt, chosen, rejected."""
    held_out: float = 0.02
    """Share of the questions that is kept for evaluation."""
    max_length: int = 2048
    """Replies are cut on the right where they pass this many tokens, prompt included."""
    loss: Literal["norm", "sum"] = "norm"
    """norm: the paper's, on the mean log-probability of a reply's tokens; sum: the usual one, which length biases."""
    beta: float = 0.0
    """How far a pair may pull the model from its start; 0: 5 for norm (the paper's), 0.1 for sum."""
    learning_rate: float = 5e-7
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Updates from a tenth of the peak to the peak; less than 1: a share of all updates."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on every parameter."""
    grad_clip: float = 0.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "max_length", self.max_length > 1, "more than 1")
        expect(self, "held_out", 0 <= self.held_out < 1, "0 to less than 1")
        expect(self, "beta", self.beta >= 0, "0 or more")
        expect(self, "data", bool(self.data), "at least one corpus")

    @property
    def strength(self) -> float:
        """The beta that is used."""
        return self.beta or {"norm": 5.0, "sum": 0.1}[self.loss]


@dataclass(frozen=True, kw_only=True)
class MathRLConfig(TuningConfig):
    """Reinforce replies whose answers are right: GRPO with verified rewards (Instella, section 5.2)."""

    out: Path = Path("runs/mathrl")
    """Run folder; running the same command again resumes it."""
    data: tuple[str, ...]
    """Files or hub ids with rows of kind answer: prompt, answer."""
    held_out: int = 0
    """About so many questions are kept, and answered before and after."""
    batch_size: int = 32
    """Questions per optimizer update, over all ranks."""
    rollout_prompts: int = 128
    """Questions whose replies are sampled at once: `rollout_prompts` / `batch_size` updates use them."""
    generations: int = 8
    """Replies to each question, in training and in evaluation."""
    max_lengths: tuple[int, int] = (512, 8192)
    """Most tokens of a prompt (longer ones are left out) and of a reply."""
    suffix: str = ""
    """Text after each question, such as a request to think step by step."""
    temperature: float = 1.0
    """Of the samples."""
    kl: float = 0.001
    """Weight of the divergence from the starting model."""
    clip: tuple[float, float, float] = (0.2, 0.2, 3.0)
    """How far a token's probability ratio counts below and above 1, and most a bad reply's token counts."""
    loss_mean: Literal["global", "micro-batch"] = "global"
    """global: one mean over all tokens of a rollout; micro-batch: the reference's, a mean of means."""
    truncated: Literal["score", "mask"] = "score"
    """Replies without an end: scored like others, right only if they have answered; or left out of the loss."""
    keep_between: tuple[float, float] = (0.0, 1.0)
    """Train on questions of which the starting model solves such a share; 0 1 trains on all."""
    vllm: Literal["off", "colocate", "server"] = "off"
    """Let vLLM sample: in this process, or on TRL's server."""
    steps: int = 0
    """Optimizer updates; 0: as many as the epochs have."""
    epochs: float = 10.0
    """Passes over the questions."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.0
    """Updates from a tenth of the peak to the peak; less than 1: a share of all updates."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on every parameter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "data", bool(self.data), "at least one corpus")
        expect(self, "held_out", self.held_out >= 0, "0 or more")
        expect(self, "generations", self.generations > 1, "at least 2")
        expect(self, "max_lengths", min(self.max_lengths) > 0, "more than 0")
        expect(self, "temperature", self.temperature > 0, "more than 0")
        expect(self, "kl", self.kl >= 0, "0 or more")
        low, high, dual = self.clip
        expect(self, "clip", 0 <= low < 1 and high >= 0 and dual > 1 + high, "0 to 1, 0 or more, more than 1 + both")
        low, high = self.keep_between
        expect(self, "keep_between", 0 <= low <= high <= 1, "two rising shares from 0 to 1")
        whole = self.rollout_prompts > 0 and self.rollout_prompts % self.batch_size == 0
        expect(self, "rollout_prompts", whole, f"a multiple of batch_size ({self.batch_size})")
        expect(self, "eval_every", not self.eval_every or self.held_out > 0, "0 where nothing is held out")
        expect(self, "eval_every", not (self.eval_every and self.shard), "0 with shard")
