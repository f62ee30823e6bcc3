"""Settings of `luthier quantize`. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from luthier.core.checks import at_least, between, expect
from luthier.core.errors import ConfigError

GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 8)
MAX_ROUNDS = 16

_PAPER: dict[str, Any] = {
    "method": "paroquant",
    "pairing": "random",
    "rounds": 8,
    "share": False,
    "scale_start": "ones",
    "start": "rtn",
    "weight_basis": "original",
    "samples": 2048,
    "validation_samples": 64,
    "sequence_length": 2048,
    "batch_size": 16,
    "epochs": (10, 10),
    "learning_rate_transform": 0.05,
    "learning_rate_weight": 1e-5,
    "learning_rate_grid": 1e-6,
    "weight_decay": 0.01,
    "warmup": 0.0,
    "guard": False,
    "scale_parameter": "linear",
    "skip": (),
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "paper": _PAPER,
    "moe": {**_PAPER, "skip": ("*shared_expert_gate", "*in_proj_a", "*in_proj_b", "*mlp.gate")},
}


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantize a model's linear layers to a few bits: scaled pairwise rotation (ParoQuant), or a baseline."""

    PRESET_FIELD: ClassVar[str] = "preset"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    model: tyro.conf.Positional[str]
    """Model folder or hub id."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/quantize")
    """Run folder; the quantized model goes to its `model`. The same command again resumes."""
    preset: Literal["quick", "paper", "moe"] = "quick"
    """quick takes minutes; paper and moe are the published settings. Single settings override it."""
    method: Literal["paroquant", "rtn", "awq", "gptq", "rotated-gptq"] = "paroquant"
    """paroquant, or a baseline on the same quantizer; rotated-gptq is GPTQ after ParoQuant's first stage."""
    bits: int = 4
    """Bits of a code: 2, 3, 4 or 8."""
    group_size: int = 128
    """Input channels that share a step size and rotate together: 32, 64 or 128."""
    rounds: int = 8
    """Rotation rounds K, 0 to 16; 0 only scales."""
    pairing: Literal["random", "round-robin"] = "round-robin"
    """How channels are paired: the reference's random draw, or complete matchings without repeats."""
    share: bool = True
    """Matrices with the same input (q, k, v; gate, up) share one transform, and so one rotation at run time."""
    skip: tuple[str, ...] = ("*shared_expert_gate", "*in_proj_a", "*in_proj_b", "*mlp.gate")
    """Modules of a layer that stay as they are, as patterns over their names."""

    data: str = "python-prose"
    """Calibration text: file, folder, hub id, python-prose, token shards, or `self` for text that the model writes."""
    samples: int = 128
    """Calibration windows."""
    validation_samples: int = 16
    """Further windows that choose the best epoch."""
    sequence_length: int = 512
    """Tokens of a window."""

    epochs: tuple[int, int] = (4, 2)
    """Passes over the windows: for scales and angles, then for weights and grid."""
    batch_size: int = 4
    """Windows of one update."""
    micro_batch_size: int = 4
    """Windows in one forward pass; changes memory and speed, not the result."""
    learning_rate_transform: float = 0.05
    """Peak rate of scales and angles (stage 1)."""
    learning_rate_weight: float = 0.02
    """Peak rate of the weights (stage 2), in step sizes where weight_basis is rotated."""
    learning_rate_grid: float = 1e-3
    """Peak rate of step sizes and zero points (stage 2), relative where weight_basis is rotated."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of everything that is trained."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    warmup: float = 0.05
    """Part of a stage's updates over which the rates rise."""
    loss: Literal["smooth-l1", "mse"] = "smooth-l1"
    """Distance between the layer's output and the original's."""
    scale_start: Literal["search", "ones"] = "search"
    """Scales that stage 1 starts from: the best between equal activations and equal weights, or 1."""
    start: Literal["rtn", "gptq"] = "gptq"
    """Codes that stage 2 starts from: rounding, or GPTQ in the rotated basis."""
    weight_basis: Literal["rotated", "original"] = "rotated"
    """Stage 2 trains the weights after the transform, in units of their step size; or as published, as they are."""
    gradient: Literal["exact", "reference"] = "exact"
    """The angles' gradient; `reference` is the published code's wrong one, for ablation only."""
    scale_parameter: Literal["log", "linear", "none"] = "log"
    """log trains ln α, which keeps scales positive; linear trains α as published; none only rotates."""
    guard: bool = True
    """Start a stage again with a quarter of the rate when its first epoch makes the validation loss worse."""

    seed: int = 0
    """Decides pairs, calibration windows and their order."""
    device: str = "auto"
    """cpu, cuda or auto. Layers visit it one at a time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Products of the layers while training; auto takes bf16 where this machine multiplies it faster."""
    spill: Path | None = None
    """Folder for the activations, when memory cannot hold them."""
    pseudo: bool = False
    """Write ordinary dequantized weights, which load anywhere, in place of codes."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the tensors that are not quantized (embeddings, norms, head) and of pseudo weights."""

    RESUMABLE_CHANGES: ClassVar[tuple[str, ...]] = ("out", "device", "micro_batch_size", "spill", "pseudo", "dtype")
    """Settings that may differ when a run is resumed: they do not touch the codes."""

    def __post_init__(self) -> None:
        _check_among("bits", self.bits, BITS)
        _check_among("group_size", self.group_size, GROUP_SIZES)
        between(self, 0, MAX_ROUNDS, "rounds")
        at_least(self, 1, "samples", "validation_samples", "sequence_length", "batch_size", "micro_batch_size")
        at_least(self, 0, "learning_rate_transform", "learning_rate_weight", "learning_rate_grid")
        at_least(self, 0, "weight_decay", "warmup")
        if self.start == "gptq" and self.weight_basis == "original" and self.epochs[1]:
            raise ConfigError(
                "start: GPTQ's codes live in the rotated basis, but weight_basis is original",
                hint="use --start rtn, or --weight-basis rotated",
            )
        if self.scale_parameter == "none" and self.scale_start == "search":
            raise ConfigError("scale_start: there are no scales to search", hint="add --scale-start ones")
        expect(self, "epochs", min(self.epochs) >= 0, "0 or more", "for example 4 4")


def _check_among(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}: got {value}, expected one of {', '.join(map(str, allowed))}",
            hint="4 bits in groups of 128 are usual",
        )
