"""Settings that every stage on a Hugging Face trainer shares. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from luthier.core.checks import above, at_least, between, expect
from luthier.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How a model is trained further: steps, learning rate, memory, when to save."""

    out: Path
    """Run folder; running the same command again resumes it."""
    model: str
    """Model folder or hub id to start from."""
    seed: int = 6198
    """Decides data order, dropout and what is sampled."""
    batch_size: int = 128
    """Sequences per optimizer update, over all ranks."""
    micro_batch_size: int = 4
    """Sequences of one rank in one forward pass; changes speed and memory, not the result."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int = 0
    """Optimizer updates; 0: as many as the epochs have."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.01
    """Updates from a tenth of the peak to the peak; less than 1: a share of all updates."""
    final_fraction: float = 0.001
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank on every linear layer and merge them at the end; 0: all weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bf16 over fp32 weights; auto takes it where this machine multiplies it faster."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shard: bool = False
    """Under torchrun: FSDP2 through accelerate, in place of a whole copy of the model on each rank."""
    device: str = "auto"
    """cpu, cuda or auto."""
    log_every: int = 10
    """Updates between rows of training metrics."""
    checkpoint_every: int = 200
    """Updates between training states."""
    keep_checkpoints: int = 2
    """Training states that are kept."""
    eval_every: int = 0
    """Updates between measurements on held-out rows; 0: only at the end."""
    stop_after: int = 0
    """Save and stop after this many updates of this process; 0: never. For time-limited jobs."""

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (
        "out",
        "device",
        "stop_after",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "micro_batch_size",
        "activation_checkpointing",
        "shard",
    )
    """Settings that may differ when a run is resumed: they do not touch the result, but for rounding."""

    def __post_init__(self) -> None:
        above(self, 0, "batch_size", "micro_batch_size", "epochs", "learning_rate", "log_every", "checkpoint_every")
        at_least(self, 0, "steps", "warmup", "weight_decay", "grad_clip", "lora_rank", "eval_every", "stop_after")
        at_least(self, 0, "seed")
        above(self, 0, "keep_checkpoints")
        between(self, 0, 1, "final_fraction")
        expect(self, "betas", all(0 <= beta < 1 for beta in self.betas), "0 to less than 1")

    def warmup_steps(self, steps: int) -> int:
        """Updates of the warm-up in a run of `steps`. Raises: ConfigError when it is longer than the run."""
        wanted = round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)
        if wanted > steps:
            raise ConfigError(
                f"warmup: got {wanted}, more than the {steps} updates of this run", hint="lower warmup, or train longer"
            )
        return wanted
