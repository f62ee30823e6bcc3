"""Architecture and training settings of entropy-estimation models. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.core.checks import above, at_least, between, inside
from luthier.core.errors import ConfigError

Half = Literal["transformer", "mixer"]
Intro = Literal["token", "embedding", "added"]
Quantizer = Literal["fsq", "noise"]
Size = Literal["nano", "tiny", "paper", "paper-512", "paper-1024", "paper-1024-deep", "paper-mixer"]

FSQ_LEVELS = (2, 3, 4, 5, 8, 16)
MOST_NOISE_LEVELS = 256  # one byte for each number, as in the published check
DEFAULT_INTRO: dict[str, Intro] = {"transformer": "token", "mixer": "embedding"}  # what the authors found best


@dataclass(frozen=True, kw_only=True)
class EemConfig:
    """The architecture of one entropy-estimation model."""

    vocab_size: int
    """Token ids; there is no id for the beginning, which is a learned vector."""
    half: Half = "transformer"
    """What encoder and decoder are made of: Llama's blocks, or masked mixers."""
    intro: Intro = "token"
    """How the code enters the decoder: as a position in front, beside each token's embedding, or added to it."""
    window: int = 256
    """Tokens of a segment at most; of a mixer, the size of its matrices."""
    encoder_width: int = 64
    """Hidden width of the encoder."""
    decoder_width: int = 128
    """Hidden width of the decoder; the way in `embedding` gives `dims` of it to the code."""
    encoder_layers: int = 2
    """Blocks of the encoder."""
    decoder_layers: int = 4
    """Blocks of the decoder."""
    heads: int = 4
    """Attention heads of a transformer; heads of a mixer's token mixing, 0 for flat."""
    kernel: int = 1
    """Features that a mixer's weights reach across."""
    dims: int = 4
    """Numbers in the code."""
    levels: int = 16
    """Values of each number."""
    quantizer: Quantizer = "fsq"
    """fsq rounds in training as in use; noise adds uniform noise in training, as published, and rounds in use."""
    noise_width: float = 0.125
    """Width of that noise, which is then the distance of two levels."""
    padding_side: Literal["left", "right"] = "right"
    """Where segments that are shorter than a batch are filled up; the other side is refused."""

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "window", "encoder_width", "decoder_width", "encoder_layers", "decoder_layers")
        at_least(self, 1, "kernel", "dims")
        _check_levels(self)
        _check_heads(self)
        if self.intro == "embedding" and self.dims >= self.decoder_width:
            raise ConfigError(
                f"dims: got {self.dims}, which leaves nothing of a decoder width of {self.decoder_width} to the tokens",
                hint="lower dims, or raise decoder_width",
            )
        if self.half == "mixer" and self.padding_side == "left":
            raise ConfigError(
                "padding_side: a mixer sees padding on the left as if it were text", hint="use padding_side right"
            )
        if self.half == "transformer" and self.kernel != 1:
            raise ConfigError(f"kernel: got {self.kernel}, but a transformer has none", hint="leave kernel at 1")

    @property
    def code_bits(self) -> float:
        """What a code costs, in bits a segment: m log2 n, the length of a fixed-length code (in blocks of segments)."""
        return self.dims * math.log2(self.levels)


def _check_levels(config: EemConfig) -> None:
    if config.quantizer == "fsq" and config.levels not in FSQ_LEVELS:
        raise ConfigError(
            f"levels: got {config.levels}, expected one of {', '.join(map(str, FSQ_LEVELS))}",
            hint="16 levels are four bits",
        )
    if config.quantizer == "noise" and not (2 <= config.levels <= MOST_NOISE_LEVELS and config.noise_width > 0):
        raise ConfigError(
            f"levels and noise_width: got {config.levels} and {config.noise_width}, expected 2 to {MOST_NOISE_LEVELS} "
            "and more than 0",
            hint="the published check has 256 levels and a width of 0.125",
        )


def _check_heads(config: EemConfig) -> None:
    if config.half == "mixer" and config.heads == 0:
        return
    for name in ("encoder_width", "decoder_width"):
        width = getattr(config, name)
        if config.heads < 1 or width % config.heads or (config.half == "transformer" and width // config.heads % 2):
            raise ConfigError(
                f"heads: {config.heads} heads do not fit a width of {width} ({name})",
                hint="heads must divide both widths, and those of a transformer must be of even size",
            )


def _shape(encoder: tuple[int, int], decoder: tuple[int, int], heads: int, dims: int) -> dict[str, Any]:
    """Width and layers of both halves, heads, and a code of so many numbers of four bits."""
    return {
        "encoder_width": encoder[0],
        "encoder_layers": encoder[1],
        "decoder_width": decoder[0],
        "decoder_layers": decoder[1],
        "heads": heads,
        "dims": dims,
        "levels": 16,
    }


# The laptop sizes read bytes. The others are the authors' models, made for a vocabulary of 8000 tokens, with their
# batch and learning rate; a code has a quarter as many numbers as the encoder is wide.
_LAPTOP = {"window": 256, "batch_size": 16, "micro_batch_size": 16, "warmup_steps": 50}
_PAPER = {"window": 1024, "batch_size": 64, "micro_batch_size": 16, "warmup_steps": 500, "steps": 200_000}
_PAPER_MIXER = {"half": "mixer", "window": 512, "batch_size": 128, "learning_rate": 5e-4}
SIZE_PRESETS: dict[str, dict[str, Any]] = {
    "nano": {**_LAPTOP, **_shape((64, 2), (128, 4), 4, 4), "learning_rate": 2e-3, "steps": 1000},
    "tiny": {**_LAPTOP, **_shape((128, 4), (256, 4), 4, 8), "learning_rate": 1e-3, "steps": 1500},
    "paper": {**_PAPER, **_shape((256, 16), (512, 16), 4, 64), "learning_rate": 2e-4},
    "paper-512": {**_PAPER, **_shape((512, 8), (512, 8), 4, 128), "learning_rate": 2e-4},
    "paper-1024": {**_PAPER, **_shape((1024, 8), (1024, 8), 4, 256), "learning_rate": 2e-4},
    "paper-1024-deep": {**_PAPER, **_shape((1024, 24), (1024, 24), 4, 256), "learning_rate": 2e-4},
    "paper-mixer": {**_PAPER, **_shape((256, 16), (512, 16), 0, 64), **_PAPER_MIXER},
}


@dataclass(frozen=True, kw_only=True)
class TrainEemConfig:
    """Train an entropy-estimation model: a causal language model that can also be told a code of the whole segment."""

    PRESET_FIELD: ClassVar[str] = "size"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZE_PRESETS

    out: Path = Path("runs/eem")
    """Run folder; running the same command again resumes it."""
    size: Size = "nano"
    """Sets widths, layers, code, window, learning rate, batch and steps together; single settings override it."""
    data: tuple[str, ...] = ("python-prose",)
    """Corpora: python-prose, a file, a folder, a hub id, or token shards made earlier."""
    held_out: float = 0.1
    """Fraction of the documents that is kept for evaluation."""
    eval_data: str = ""
    """Token shards to evaluate on when the corpora are token shards too (which cannot be split)."""
    tokenizer: str = ""
    """A folder or hub id with a tokenizer; empty: bytes, 256 of them and an end-of-text token."""
    seed: int = 6198
    """Decides initial weights, data order, and which segments go without their code."""

    half: Half = "transformer"
    """What encoder and decoder are made of."""
    intro: Literal["auto", "token", "embedding", "added"] = "auto"
    """How the code enters the decoder; auto: token for a transformer, embedding for a mixer."""
    window: int = 256
    """Tokens of a segment."""
    encoder_width: int = 64
    """Hidden width of the encoder."""
    decoder_width: int = 128
    """Hidden width of the decoder."""
    encoder_layers: int = 2
    """Blocks of the encoder."""
    decoder_layers: int = 4
    """Blocks of the decoder."""
    heads: int = 4
    """Attention heads of a transformer; heads of a mixer's token mixing, 0 for flat."""
    kernel: int = 1
    """Features that a mixer's weights reach across."""
    dims: int = 4
    """Numbers in the code of a segment."""
    levels: int = 16
    """Values of each number: 2, 3, 4, 5, 8 or 16 (noise: 2 to 256)."""
    quantizer: Quantizer = "fsq"
    """fsq rounds in training as in use; noise adds uniform noise in training, as published, and rounds in use."""
    noise_width: float = 0.125
    """Width of that noise."""
    padding_side: Literal["left", "right"] = "right"
    """Where short segments are filled up; stored with the model, and the other side is refused."""
    null_share: float = 0.4
    """Share of the training segments whose code is replaced by a learned null: what makes it a causal model too."""

    batch_size: int = 16
    """Segments per optimizer update."""
    micro_batch_size: int = 16
    """Segments in one forward pass; changes speed and memory, not the result."""
    steps: int = 1000
    """Optimizer updates."""
    learning_rate: float = 2e-3
    """Peak learning rate; it falls linearly to zero."""
    warmup_steps: int = 50
    """Updates from a tenth of the peak to the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 computes in bf16 over fp32 master weights; auto takes it on CUDA, where it is native."""
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
    eval_segments: int = 128
    """Held-out segments of an evaluation on the way; the last one uses all."""
    stop_after: int = 0
    """Save and stop after this many steps of this process; 0: never. For time-limited jobs."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "micro_batch_size", "steps", "log_every", "checkpoint_every")
        at_least(self, 1, "keep_checkpoints", "eval_segments")
        at_least(self, 0, "seed", "warmup_steps", "weight_decay", "grad_clip", "eval_every", "stop_after")
        above(self, 0, "learning_rate")
        between(self, 0, 1, "null_share")
        inside(self, 0, 1, "held_out")
        if not self.data:
            raise ConfigError("data: got no corpus, expected at least one", hint="for example data: [python-prose]")
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps: got {self.warmup_steps}, more than the {self.steps} steps",
                hint="lower warmup_steps or raise steps",
            )
        self.architecture(vocab_size=1)

    def architecture(self, vocab_size: int) -> EemConfig:
        """The model that these settings describe, for a vocabulary. ConfigError when it is impossible."""
        return EemConfig(
            vocab_size=vocab_size,
            half=self.half,
            intro=DEFAULT_INTRO[self.half] if self.intro == "auto" else self.intro,
            window=self.window,
            encoder_width=self.encoder_width,
            decoder_width=self.decoder_width,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            heads=self.heads,
            kernel=self.kernel,
            dims=self.dims,
            levels=self.levels,
            quantizer=self.quantizer,
            noise_width=self.noise_width,
            padding_side=self.padding_side,
        )

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (
        "out",
        "device",
        "stop_after",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "micro_batch_size",
    )
    """Settings that may differ when a run is resumed: they do not touch the result, but for rounding."""
