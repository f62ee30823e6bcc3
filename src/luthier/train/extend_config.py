"""Settings of `luthier extend`, and the RoPE base that follows from them. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from luthier.core.errors import ConfigError
from luthier.models.arithmetic import extended_rope_theta
from luthier.train.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """Train an Instella to use a longer context: a larger RoPE base, longer packed rows, document masks."""

    start: tyro.conf.Positional[str]
    """A model folder or hub id, whose optimizer moments begin at zero, or the run folder of an earlier training, whose
    moments go on (phase 2)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/extend")
    """Run folder; running the same command again resumes it."""
    sequence_length: int = 1024
    """Tokens per row, and the context that the model has afterwards."""
    theta: Literal["law", "keep"] | float = "law"
    """RoPE base: by the paper's law from the model's own base and length, kept as it is, or a number."""
    trained_length: int = 0
    """Context length that the model's own base belongs to, for the law; 0: its max_position_embeddings."""
    data: tuple[str, ...] = ("python-prose",)
    """Corpora: python-prose, a file, a folder, a hub id, or token shards; conversations teach their replies only."""
    weights: tuple[float, ...] = ()
    """Share of the training rows that each corpus gets; empty: in proportion to its tokens."""
    held_out: float = 0.1
    """Fraction of the documents that is kept for evaluation."""
    eval_data: str = ""
    """Token shards to evaluate on when the corpora are token shards too (which cannot be split)."""
    seed: int = 6198
    """Decides data order and samples."""

    batch_size: int = 4
    """Rows per optimizer update, over all ranks."""
    micro_batch_size: int = 4
    """Rows of one rank in one forward pass; changes speed and memory, not the result."""
    steps: int = 150
    """Optimizer updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: the paper's; muon: orthogonal updates for the matrices."""
    learning_rate: float = 3e-4
    """Peak learning rate; a good one is near the rate at which the start's training ended."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 15
    """Updates from a tenth of the peak to the peak."""
    final_fraction: float = 0.001
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bf16 over fp32 master weights; auto takes it where this machine multiplies it faster."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block; auto does on CUDA, and in runs of 500 steps or more where a C++ compiler is found."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    """Attention kernel; auto takes SDPA. flex_attention (CUDA) skips what document masks hide."""
    document_mask: bool = True
    """Attend within documents only, as in the paper; positions run on over the row."""
    activation_checkpointing: bool = False
    """Recompute activations of each block in the backward pass: less memory, about a third more time."""
    shard_size: int = 0
    """FSDP2 under torchrun: ranks that share one copy of the model (HSDP when fewer than all); 0 means all."""
    sequence_parallel: int = 1
    """Ranks that compute each row together, a part of its tokens each (Ulysses); divides ranks, heads and
    sequence_length. The paper's phase 2 has 4."""
    device: str = "auto"
    """cpu, cuda or auto."""

    log_every: int = 10
    """Steps between rows of training metrics."""
    checkpoint_every: int = 50
    """Steps between training states."""
    keep_checkpoints: int = 2
    """Training states that are kept."""
    eval_every: int = 50
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    sample_prompts: tuple[str, ...] = ("The", "Return", "If")
    """Beginnings that the model continues at each evaluation (in one process only); empty: no samples."""
    stop_after: int = 0
    """Save and stop after this many steps of this process; 0: never. For time-limited jobs."""

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (*PretrainConfig.RESUMABLE_CHANGES, "sequence_parallel")
    """Settings that may differ when a run is resumed: they do not touch the result, but for rounding."""

    def __post_init__(self) -> None:
        if not self.start:
            raise ConfigError("start: got nothing, expected a model", hint="give a model folder, hub id or run folder")
        if not isinstance(self.theta, str) and not 1 < self.theta < float("inf"):
            raise ConfigError(f"theta: got {self.theta}, expected more than 1", hint="for example --theta law")
        if self.trained_length < 0 or (self.trained_length and self.theta != "law"):
            raise ConfigError(
                f"trained_length: got {self.trained_length} with theta {self.theta}",
                hint="leave it 0; only the law asks for the length that the model's base belongs to",
            )
        self.as_pretraining()  # checks all that the two share
        if self.sequence_parallel < 1 or self.sequence_length % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel: got {self.sequence_parallel} with rows of {self.sequence_length} tokens",
                hint="use a divisor of sequence_length",
            )
        if self.sequence_parallel > 1 and self.attention not in ("auto", "sdpa", "flex_attention"):
            raise ConfigError(
                f"sequence_parallel: {self.attention} attention cannot be split among ranks",
                hint="use --attention flex_attention (CUDA) or sdpa",
            )

    def as_pretraining(self) -> PretrainConfig:
        """The same settings for the training itself, which is that of `luthier pretrain`."""
        own = {field.name for field in fields(self)}
        shared = [field.name for field in fields(PretrainConfig) if field.name in own]
        return PretrainConfig(**{name: getattr(self, name) for name in shared})


def new_theta(config: ExtendConfig, theta: float, length: int) -> float:
    """The RoPE base that training goes on with, from the model's own base and the length in tokens that it reads.

    ConfigError when the law is asked to shorten the context.
    """
    if config.theta == "keep":
        return theta
    if not isinstance(config.theta, str):
        return config.theta
    trained = config.trained_length or length
    if config.sequence_length < trained:
        raise ConfigError(
            f"sequence_length: got {config.sequence_length}, but the model was trained with {trained} already",
            hint="give a longer sequence_length, or --theta keep to train on with the same base",
        )
    return extended_rope_theta(theta, trained, config.sequence_length)
