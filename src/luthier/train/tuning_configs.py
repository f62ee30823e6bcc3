"""Settings of the stages after pretraining: sft, dpo, mathrl. The defaults are the paper's. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        self.expect("max_length", self.max_length > 1, "more than 1")
        self.expect("held_out", 0 <= self.held_out < 1, "0 to less than 1")
        self.expect("data", bool(self.data), "at least one corpus")


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
        self.expect("max_length", self.max_length > 1, "more than 1")
        self.expect("held_out", 0 <= self.held_out < 1, "0 to less than 1")
        self.expect("beta", self.beta >= 0, "0 or more")
        self.expect("data", bool(self.data), "at least one corpus")

    @property
    def strength(self) -> float:
        """The beta that is used."""
        return self.beta or {"norm": 5.0, "sum": 0.1}[self.loss]
