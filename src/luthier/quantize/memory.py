"""How much memory quantizing takes: an estimate from shapes before it starts, and the true peak. Loads no torch.

The estimate counts what grows with model and text: hidden states, one layer, what training keeps for each weight,
and what one micro-batch leaves behind for the backward pass. `peak` is the sum of what is there at one time.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.quantize.config import QuantizeConfig

HALF_ABOVE = 2**30  # bytes in fp32 above which a store of hidden states keeps fp16
STORES = 2  # the original's chain, whose outputs replace its inputs, and the quantized model's
WEIGHT = 4  # bytes; layers are computed in fp32
# fp32 numbers that a method keeps for each weight of a layer beside the weight itself, at its worst moment: ParoQuant
# has a copy to train, its gradient, two moments, the best so far, and what autograd keeps of the transform. Measured.
NUMBERS_PER_WEIGHT = {"paroquant": 22.0, "rotated-gptq": 22.0, "gptq": 3.0, "awq": 4.0, "rtn": 3.0}
# Bytes for each entry of the widest input's second moments (in, in): GPTQ factors them in fp64. Measured.
BYTES_PER_MOMENT = {"paroquant": 50.0, "rotated-gptq": 50.0, "gptq": 50.0, "awq": 45.0, "rtn": 0.0}
# fp32 numbers for each token that autograd keeps in one layer: so many times hidden size, and intermediate size.
NUMBERS_PER_HIDDEN, NUMBERS_PER_INTERMEDIATE = 11.0, 5.0
TRAINED = ("paroquant", "rotated-gptq")  # other methods keep nothing for a backward pass
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """What the estimate needs of a model: sizes, and numbers of parameters in its largest layer and outside all.

    `intermediate` is that of a token, over the experts that it visits; `widest` is the largest input of one matrix.
    """

    hidden: int
    intermediate: int
    widest: int
    largest_layer: int
    outside: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by item. `hidden_states` are in memory, or in a file; all the rest is on the device that computes."""

    hidden_states: int
    embeddings: int
    layer: int
    training: int
    batch: int

    @property
    def computing(self) -> int:
        """At most on the device at one time, without hidden states. Embeddings are gone before a layer comes."""
        return max(self.embeddings, self.layer + self.training + self.batch)

    @property
    def peak(self) -> int:
        """At most at one time where hidden states and layers share one memory."""
        return self.hidden_states + self.computing

    def rows(self) -> list[tuple[str, str]]:
        """(item, size) for a table."""
        names = {
            "hidden_states": "hidden states of all windows",
            "embeddings": "embeddings, before the first layer",
            "layer": "one layer in fp32",
            "training": "what the method keeps for its weights",
            "batch": "one micro-batch",
        }
        rows = [(label, size_text(getattr(self, name))) for name, label in names.items()]
        return [*rows, ("peak at one time", size_text(self.peak))]


def model_shapes(model: Any) -> ModelShapes:
    """The shapes of a transformers model, which may be without storage."""
    config = model.config.get_text_config()
    by_layer, outside, widest = dict[str, int](), 0, 0
    for name, parameter in model.named_parameters():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        if layer is None:
            outside += parameter.numel()
        else:
            by_layer[layer] = by_layer.get(layer, 0) + parameter.numel()
            widest = max(widest, parameter.shape[-1] if parameter.dim() == 2 else 0)
    experts = getattr(config, "num_experts_per_tok", None) or 0
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return ModelShapes(
        hidden=config.hidden_size,
        intermediate=max(dense, experts * (getattr(config, "moe_intermediate_size", None) or dense)),
        widest=widest,
        largest_layer=max(by_layer.values(), default=0),
        outside=outside,
    )


def estimate(shapes: ModelShapes, config: QuantizeConfig) -> Estimate:
    """What quantizing takes at most; for hidden states in a file their size is that of the file."""
    trained = config.method in TRAINED and any(config.epochs)
    windows = (config.samples, config.validation_samples)
    states = sum(STORES * store_bytes(count, config.sequence_length, shapes.hidden) for count in windows)
    tokens = config.micro_batch_size * config.sequence_length
    numbers = NUMBERS_PER_HIDDEN * shapes.hidden + NUMBERS_PER_INTERMEDIATE * shapes.intermediate
    kept = numbers if trained else 4 * shapes.hidden + 3 * shapes.intermediate
    weights = WEIGHT * NUMBERS_PER_WEIGHT[config.method] * shapes.largest_layer
    moments = BYTES_PER_MOMENT[config.method] * shapes.widest**2
    return Estimate(
        hidden_states=states,
        embeddings=WEIGHT * shapes.outside,
        layer=WEIGHT * shapes.largest_layer,
        training=int(max(weights, moments) if trained else weights + moments),  # one after the other in the first
        batch=int(WEIGHT * tokens * kept),
    )


def store_bytes(windows: int, tokens: int, hidden: int) -> int:
    """Bytes of one store of hidden states; large ones keep fp16."""
    size = 4 * windows * tokens * hidden
    return size // 2 if size > HALF_ABOVE else size


def size_text(num_bytes: float) -> str:
    """Bytes with a unit, such as 1.5 GiB."""
    for unit, name in UNITS:
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


def available_memory() -> int | None:
    """Bytes that this process can still have without swapping; None where the system does not say."""
    return _status("/proc/meminfo", "MemAvailable")


class PeakMeter:
    """The most memory in use since it was made, beyond what was in use then; of a GPU, what torch allocated."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        self.since_start = _forget_peak()
        self._base = resident_memory() if self.since_start else 0
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._device = device

    def read(self) -> dict[str, int]:
        """Bytes: `memory` and, where there is one, `gpu`."""
        found = {"memory": max(0, peak_memory() - self._base)}
        if self._cuda:
            import torch

            found["gpu"] = torch.cuda.max_memory_allocated(self._device)
        return found

    def line(self, expected: Estimate, *, spilled: bool = False) -> str:
        """The estimate beside what was measured, for the end of a run."""
        measured = self.read()
        host = expected.hidden_states if self._cuda else expected.computing + (0 if spilled else expected.hidden_states)
        words = [f"memory {size_text(measured['memory'])}, estimated {size_text(host)}"]
        if not self.since_start:
            words[0] += " (measured since the process began)"
        if "gpu" in measured:
            words.append(f"GPU {size_text(measured['gpu'])}, estimated {size_text(expected.computing)}")
        return "peak: " + "; ".join(words)


def resident_memory() -> int:
    """Bytes of this process in memory now."""
    now = _status("/proc/self/status", "VmRSS")
    return now if now is not None else peak_memory()


def peak_memory() -> int:
    """The most bytes of this process that were in memory at one time."""
    peak = _status("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> bool:
    """Let the system count the peak from now on; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return os.name == "posix"


def _status(path: str, key: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
