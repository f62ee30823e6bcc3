"""Shape and training settings of the compressor's byte-level network. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.core.checks import above, between, inside
from luthier.core.errors import ConfigError
from luthier.entropy.codec.integer_features import NAMES
from luthier.entropy.codec.integer_weights import MAX_CODE


@dataclass(frozen=True, kw_only=True)
class ByteModelConfig:
    """Shape of the network; widths are multiples of 16, as the integer form computes in blocks of that many."""

    width: int = 128
    """Numbers per byte in the residual stream."""
    layers: int = 4
    """Blocks of attention and feed-forward."""
    heads: int = 4
    """Query heads; they share one head of keys and values."""
    head_width: int = 32
    """Numbers per head."""
    hidden: int = 512
    """Numbers inside a feed-forward block."""
    window: int = 128
    """Bytes that one layer attends to, the current one included."""
    table_bits: tuple[int, ...] = (12, 13, 13, 13, 13)
    """Binary logarithm of the rows of each hashed table, in the order of `integer_features.NAMES[1:]`."""
    code_dims: int = 0
    """Dimensions of a code of the whole segment; 0: the network knows none."""
    code_levels: int = 4
    """Levels of each dimension."""

    def __post_init__(self) -> None:
        for name in ("width", "head_width", "hidden", "window"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a multiple of 16", hint="round it up")
        if len(self.table_bits) != len(NAMES) - 1 or not all(1 <= bits <= 20 for bits in self.table_bits):
            raise ConfigError(
                f"table_bits: got {self.table_bits}, expected {len(NAMES) - 1} numbers from 1 to 20",
                hint="for example 12 13 13 13 13",
            )
        for name, least in {"code_dims": 0, "code_levels": 2}.items():
            between(self, least, MAX_CODE[name], name)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainCodecConfig:
    """Train the byte-level network of the compressor, and write it in integers."""

    out: Path = Path("runs/train-codec")
    """Run folder; running the same command again resumes it. The network is its file network.bin."""
    data: tuple[str, ...] = ("python-prose",)
    """Corpora: python-prose, a file, a folder, a hub id, or token shards of single bytes made earlier."""
    held_out: float = 0.02
    """Fraction of the documents that is kept for evaluation."""
    eval_data: str = ""
    """Token shards to evaluate on when the corpora are token shards too (which cannot be split)."""
    seed: int = 6198
    """Decides initial weights and data order."""

    width: int = 128
    """Numbers per byte in the residual stream; a multiple of 16, like the next three."""
    hidden: int = 512
    """Numbers inside a feed-forward block."""
    head_width: int = 32
    """Numbers in each of the query heads, and in the key and value that they share."""
    window: int = 128
    """Bytes that one layer attends to."""
    layers: int = 4
    """Blocks of attention and feed-forward."""
    heads: int = 4
    """Query heads."""
    table_bits: tuple[int, ...] = (12, 13, 13, 13, 13)
    """Binary logarithm of the rows for the last 2, 3 and 4 bytes, for the word so far, and for it with the last one."""
    code_dims: int = 0
    """Dimensions of a code that tells the network what text is coming, up to 8; 0 for none."""
    code_levels: int = 4
    """Levels of each dimension, 2 to 16."""
    code_share: float = 0.5
    """Share of the training sequences that get a code; the others teach the network to do without."""

    sequence_length: int = 256
    """Bytes per training sequence."""
    broken_lines: float = 0.5
    """Share of the sequences in which some spaces become newlines, as in files whose lines have a width."""
    batch_size: int = 8
    """Sequences per optimizer update."""
    micro_batch_size: int = 8
    """Sequences in one forward pass; changes speed and memory, not the result."""
    steps: int = 20_000
    """Optimizer updates."""
    learning_rate: float = 4e-3
    """Peak learning rate; it falls linearly to zero."""
    warmup_steps: int = 60
    """Updates from a tenth of the peak to the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay on matrices; tables and head biases have none."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""
    compile: Literal["on", "off"] = "off"
    """torch.compile each block; saves about a tenth of each step."""
    device: str = "auto"
    """cpu, cuda or auto."""

    log_every: int = 50
    """Steps between rows of training metrics."""
    checkpoint_every: int = 500
    """Steps between training states."""
    keep_checkpoints: int = 2
    """Training states that are kept."""
    eval_every: int = 2000
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    eval_tokens: int = 65_536
    """Held-out bytes of an evaluation, and of the comparison of integers with floating point at the end."""
    stop_after: int = 0
    """Save and stop after this many steps of this process; 0: never. For time-limited jobs."""

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = (
        "out",
        "device",
        "stop_after",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "micro_batch_size",
        "compile",
    )
    """Settings that may differ when a run is resumed: they do not touch the result, but for rounding."""
    CODE_SETTINGS: ClassVar[tuple[str, ...]] = ("code_dims", "code_levels", "code_share")
    """Settings that say nothing when `code_dims` is 0; runs without codes do not store them, as older ones did not."""

    def __post_init__(self) -> None:
        above(self, 0, "sequence_length", "batch_size", "micro_batch_size", "steps", "learning_rate", "eval_tokens")
        inside(self, 0, 1, "held_out", "code_share")
        between(self, 0, 1, "broken_lines")
        if self.warmup_steps > self.steps:
            raise ConfigError(f"warmup_steps: got {self.warmup_steps}, more than all steps", hint="lower warmup_steps")
        self.model()

    def model(self) -> ByteModelConfig:
        """The network's own settings."""
        sizes = ("width", "hidden", "head_width", "window", "layers", "heads", "table_bits")
        names = (*sizes, "code_dims", "code_levels")
        return ByteModelConfig(**{name: getattr(self, name) for name in names})
