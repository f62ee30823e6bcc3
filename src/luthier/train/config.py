"""Settings of the training verbs. Loads no torch, so that help, checks and dry runs are instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.core.checks import above, at_least, between
from luthier.core.errors import ConfigError

Size = Literal["pico", "nano", "tiny", "small", "3b"]

# The one dial. Wider models want smaller learning rates. The laptop sizes see about 3 M tokens, five to six passes over
# the default corpus (more of them overfit it); their batch and length fill two cores. `3b` is the paper's stage 1.
_LAPTOP = {"sequence_length": 256, "batch_size": 16, "micro_batch_size": 8, "warmup_steps": 50}
SIZE_PRESETS: dict[str, dict[str, Any]] = {
    "pico": {**_LAPTOP, "batch_size": 8, "learning_rate": 4e-3, "steps": 1500},
    "nano": {**_LAPTOP, "batch_size": 8, "learning_rate": 4e-3, "steps": 1500},
    "tiny": {**_LAPTOP, "learning_rate": 3e-3, "steps": 700},
    "small": {**_LAPTOP, "learning_rate": 2e-3, "steps": 700},
    "3b": {
        "sequence_length": 4096,
        "batch_size": 1024,
        "micro_batch_size": 8,
        "warmup_steps": 2000,
        "learning_rate": 4e-4,
        "steps": 969_171,
    },
}
VOCABULARIES: dict[Size, int] = {"pico": 2048, "nano": 2048, "tiny": 4096, "small": 4096, "3b": 50304}
"""Rows of the embedding that go with each size."""
USUAL: Size = "tiny"
"""The size of a run that begins with random weights, where none is said."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a causal language model from random weights (stage 1 of Instella's recipe) or from a start (stage 2)."""

    PRESET_FIELD: ClassVar[str] = "size"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {**SIZE_PRESETS, "auto": SIZE_PRESETS[USUAL]}

    out: Path = Path("runs/pretrain")
    """Run folder; running the same command again resumes it."""
    size: Literal[Size, "auto"] = "auto"
    """Sets width, depth, vocabulary, learning rate, batch and steps together; single settings override it. auto: tiny;
    with a start, its shape, and the other settings of tiny."""
    start: str = ""
    """Go on from here, with the model's shape and tokenizer: a run folder gives weights and optimizer moments, a model
    folder or hub id gives weights only. Steps, schedule, data and seed are those of this run. Empty: random weights.
    (torchrun has options of its own that begin with --start: write `torchrun … -m -- luthier pretrain --start …`.)"""
    model: str = ""
    """Another architecture: a folder or hub id whose config.json describes any Hugging Face causal LM."""
    data: tuple[str, ...] = ("python-prose",)
    """Corpora: python-prose, a file, a folder, a hub id, or token shards made earlier."""
    weights: tuple[float, ...] = ()
    """Share of the training sequences that each corpus gets; empty: in proportion to its tokens."""
    held_out: float = 0.1
    """Fraction of the documents that is kept for evaluation."""
    eval_data: str = ""
    """Token shards to evaluate on when the corpora are token shards too (which cannot be split)."""
    tokenizer: str = ""
    """A folder or hub id with a tokenizer; empty: train a byte-level BPE on the training documents."""
    vocab_size: int = 0
    """Rows of the embedding, and the size of a trained tokenizer; 0: as the size says, or the start's."""
    seed: int = 6198
    """Decides initial weights, data order and samples."""

    sequence_length: int = 256
    """Tokens per sequence."""
    context_length: int = 0
    """Most tokens that the model accepts later; 0: sequence_length. When it is more, positions skip now and then in
    training, so that what is learned carries over to distances that far; needs document_mask."""
    batch_size: int = 16
    """Sequences per optimizer update, over all ranks."""
    micro_batch_size: int = 8
    """Sequences of one rank in one forward pass; changes speed and memory, not the result."""
    steps: int = 700
    """Optimizer updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: the paper's; muon: orthogonal updates for the matrices, which learn more from each token here."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 50
    """Updates from a tenth of the peak to the peak."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter as in the paper."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bf16 over fp32 master weights; auto takes it where this machine multiplies it faster."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block; auto does on CUDA, and in runs of 500 steps or more where a C++ compiler is found."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    """Attention kernel; auto takes SDPA, or plain matrix products where these are faster (bf16, CPU, short rows)."""
    document_mask: bool = False
    """Attend within documents only; the paper's pretraining attends across them."""
    activation_checkpointing: bool = False
    """Recompute activations of each block in the backward pass: less memory, about a third more time."""
    shard_size: int = 0
    """FSDP2 under torchrun: ranks that share one copy of the model (HSDP when fewer than all); 0 means all."""
    device: str = "auto"
    """cpu, cuda or auto."""

    log_every: int = 10
    """Steps between rows of training metrics."""
    checkpoint_every: int = 200
    """Steps between training states."""
    keep_checkpoints: int = 2
    """Training states that are kept."""
    eval_every: int = 200
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    sample_prompts: tuple[str, ...] = ("The", "Return", "If")
    """Beginnings that the model continues at each evaluation (in one process only); empty: no samples."""
    stop_after: int = 0
    """Save and stop after this many steps of this process; 0: never. For time-limited jobs."""

    def __post_init__(self) -> None:
        if not self.start:  # what is stored says what was used
            object.__setattr__(self, "size", USUAL if self.size == "auto" else self.size)
            object.__setattr__(self, "vocab_size", self.vocab_size or VOCABULARIES[self.size])  # type: ignore[index]
        above(self, 0, "sequence_length", "batch_size", "micro_batch_size", "steps", "log_every")
        above(self, 0, "checkpoint_every", "keep_checkpoints", "learning_rate")
        at_least(self, 0, "grad_clip", "weight_decay", "warmup_steps", "shard_size", "eval_every", "stop_after")
        at_least(self, 0, "seed", "context_length", "vocab_size")
        between(self, 0, 1, "held_out", "final_fraction")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: got {self.betas}, expected 0 to less than 1", hint="for example 0.9 0.95")
        if self.held_out in (0, 1):
            raise ConfigError(f"held_out: got {self.held_out}, which leaves one part empty", hint="for example 0.1")
        if not self.data:
            raise ConfigError("data: got no corpus, expected at least one", hint="for example data: [python-prose]")
        if self.weights and len(self.weights) != len(self.data):
            raise ConfigError(
                f"weights: got {len(self.weights)} for {len(self.data)} corpora", hint="give one weight for each corpus"
            )
        if self.context_length and (self.context_length < self.sequence_length or not self.document_mask):
            raise ConfigError(
                f"context_length: got {self.context_length} with sequences of {self.sequence_length}",
                hint="leave it 0, or give more than sequence_length, with document_mask",
            )
        if self.start and self.model:
            raise ConfigError(
                f"model: got {self.model!r}, but the architecture is that of `start`",
                hint="drop --model, or drop --start to begin with random weights",
            )
        if self.document_mask and self.model:
            raise ConfigError(
                "document_mask: other architectures cannot be told which document a token belongs to",
                hint="drop document_mask, or pretrain an Instella",
            )
        if self.document_mask and self.attention == "flash_attention_2":
            raise ConfigError(
                "document_mask: flash_attention_2 cannot be told which document a token belongs to",
                hint="use --attention flex_attention or sdpa",
            )
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps: got {self.warmup_steps}, more than the {self.steps} steps",
                hint="lower warmup_steps or raise steps",
            )

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (
        "out",
        "device",
        "stop_after",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "micro_batch_size",
        "compile",
        "attention",
        "activation_checkpointing",
        "shard_size",
    )
    """Settings that may differ when a run is resumed: they do not touch the result, but for rounding."""
