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
