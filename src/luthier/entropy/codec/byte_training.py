"""Training the compressor's byte-level network on the loop that pretraining uses, and turning it into integers.

Every training sequence is a stream of its own: the network starts with nothing read, as it does in use. Where a
document ends, the network reads a newline, and is not asked to predict it. Corpora for language models keep a paragraph
on one line, files on a disk often do not: so some of the sequences get lines broken (`break_lines`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.data.mixture import WindowMixture
from luthier.entropy.codec.byte_config import TrainCodecConfig
from luthier.entropy.codec.byte_model import ByteModel
from luthier.entropy.codec.integer_features import NEWLINE
from luthier.entropy.codec.integer_network import IntegerNetwork
from luthier.entropy.codec.integer_weights import IntegerWeights
from luthier.entropy.codec.quantize_network import quantize
from luthier.entropy.codec.segment_code import network_bits
from luthier.learn.loop import Job, LoopSettings, train
from luthier.learn.meters import Meter, peak_flops
from luthier.learn.objectives import IGNORED
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.schedule import learning_rate
from luthier.learn.state import TrainState, resume

BYTES = 256
SPACE = 32
LINE_WIDTHS = (55, 81)  # bytes; from, and up to but without
BETAS = (0.9, 0.95)
STREAMS = 8  # into which held-out text is cut
SAMPLE_BATCHES = 8  # training batches that decide the scales of activations


class ByteLoss(nn.Module):
    """The network and its loss as one module."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, sent: Tensor | None = None) -> Tensor:
        """Summed nats of the targets (B, T) that are bytes, given `sent` (B) dimensions of the code; scalar fp32."""
        logits = self.model(as_bytes(input_ids), sent).flatten(0, 1)
        wanted = targets.where((targets >= 0) & (targets < BYTES), IGNORED).flatten()
        return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")


def as_bytes(ids: Tensor) -> Tensor:
    """Token ids with every one that is no byte, which closes a document, replaced by a newline."""
    return ids.where(ids < BYTES, NEWLINE)


@dataclass(frozen=True)
class TrainedNetwork:
    """The outcome. `weights` and `held_out`, bits per byte of both forms on one text, are None when stopped early."""

    model: ByteModel
    state: TrainState
    weights: IntegerWeights | None
    held_out: dict[str, float] | None


def train_codec(
    config: TrainCodecConfig,
    mixture: WindowMixture,
    held_out: NDArray[np.int64],
    provenance: Mapping[str, Any],
    *,
    who: Ranks,
    checkpoints: Path,
    run: RunFolder | None,
    console: Console,
) -> TrainedNetwork:
    """Train, or resume from the newest state in `checkpoints`. held_out: token ids (N). ConfigError for many ranks."""
    if who.world_size > 1:
        raise ConfigError(
            f"train-codec runs in one process, got {who.world_size} ranks", hint="start it without torchrun"
        )
    model = ByteModel(config.model())
    model.initialize(derive_seed(config.seed, "initial weights"))
    if model.segment is not None:
        model.segment.center(sample_of(mixture, config))
    if config.compile == "on":
        for block in model.layers:
            block.compile()
    objective = ByteLoss(model.to(who.device))
    weights = Weights(objective)
    state = TrainState(weights, optimizer_of(model, config), cursor=mixture.state_dict())
    resume(state, mixture, checkpoints, who, run, console)
    text = streams_of(held_out, config.eval_tokens)
    job = Job(
        objective=objective,
        state=state,
        batch_at=partial(training_batch, mixture, config),
        learning_rate=partial(
            learning_rate,
            schedule="linear",
            peak=config.learning_rate,
            warmup=config.warmup_steps,
            total=config.steps,
            final_fraction=0.0,
        ),
        seed=config.seed,
        meter=Meter(flops_per_byte(model), peak_flops(who.device, torch.float32)),
        checkpoints=checkpoints,
        run=run,
        evaluate=lambda: {"bits_per_byte": float_bits(model, text), **coded_bits(model, text, config.sequence_length)},
    )
    if not train(job, LoopSettings.of(config), who, console):
        return TrainedNetwork(model, state, None, None)
    integers = quantize(model.cpu(), sample_of(mixture, config), provenance)
    scores = {"float": float_bits(model, text), "integer": integer_bits(IntegerNetwork(integers), text)}
    return TrainedNetwork(model, state, integers, scores)


def training_batch(mixture: WindowMixture, config: TrainCodecConfig, step: int) -> dict[str, NDArray[np.int64]]:
    """The sequences of a step, `broken_lines` of them with their lines broken; a function of the step alone."""
    batch = mixture.batch(step)
    rows = np.concatenate([batch["input_ids"], batch["targets"][:, -1:]], 1)
    for number, row in enumerate(rows):
        rng = np.random.default_rng(derive_seed(config.seed, "lines", step * config.batch_size + number))
        if rng.random() < config.broken_lines:
            width = int(rng.integers(*LINE_WIDTHS))
            break_lines(row, width, column=int(rng.integers(width)))
    batch = {"input_ids": rows[:, :-1], "targets": rows[:, 1:]}
    return batch | {"sent": sent_dims(config, step)} if config.code_dims else batch


def sample_of(mixture: WindowMixture, config: TrainCodecConfig) -> Tensor:
    """The bytes (N, T) of the first batches, to choose scales by."""
    batches = [training_batch(mixture, config, step)["input_ids"] for step in range(SAMPLE_BATCHES)]
    return as_bytes(torch.from_numpy(np.concatenate(batches)))


def sent_dims(config: TrainCodecConfig, step: int) -> NDArray[np.int64]:
    """Dimensions of the segment code that each sequence of a step is given (B): none, or the first 1 to m of them."""
    rng = np.random.default_rng(derive_seed(config.seed, "codes", step))
    given = rng.random(config.batch_size) < config.code_share
    return np.where(given, rng.integers(1, config.code_dims + 1, config.batch_size), 0)


def break_lines(row: NDArray[np.int64], width: int, column: int = 0) -> None:
    """Turn spaces of bytes (T) into newlines, so that no line is longer than `width` where words allow; in place.

    column: where in its line the first byte stands.
    """
    start, space = -column, -1
    for place in np.flatnonzero((row == NEWLINE) | (row == SPACE)).tolist():
        if place - start > width and space >= 0:
            row[space], start = NEWLINE, space + 1
        if row[place] == NEWLINE:
            start, space = place + 1, -1
        else:
            space = place


def optimizer_of(model: ByteModel, config: TrainCodecConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: rows of a table that seldom occur would vanish between two of their updates."""
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)


def flops_per_byte(model: ByteModel) -> float:
    """6 FLOPs per multiplied parameter, and 12 for each number of a head and place of the window in each layer."""
    config = model.config
    multiplied = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return 6.0 * multiplied + 12.0 * config.layers * config.heads * config.head_width * config.window


def streams_of(ids: NDArray[np.int64], most: int) -> NDArray[np.uint8]:
    """At most `most` held-out tokens as bytes (STREAMS, T), consecutive pieces; ends of documents are left out."""
    text = ids[ids < BYTES][:most].astype(np.uint8)
    streams = min(STREAMS, len(text))
    return text[: len(text) // streams * streams].reshape(streams, -1)


@torch.no_grad()
def float_bits(model: ByteModel, text: NDArray[np.uint8]) -> float:
    """Bits per byte of streams (B, T) under the float network; all bytes are charged, the first ones too."""
    nats, device = 0.0, model.head.weight.device
    with torch.compiler.set_stance("force_eager"):  # a few forward passes do not win back a compilation
        for row in text:
            bytes_of_row = torch.from_numpy(row.astype(np.int64)).to(device)[None]
            logits = model(F.pad(bytes_of_row, (1, 0), value=NEWLINE)[:, :-1])
            nats += float(F.cross_entropy(logits[0], bytes_of_row[0], reduction="sum"))
    return nats / math.log(2) / text.size


@torch.no_grad()
def coded_bits(model: ByteModel, text: NDArray[np.uint8], length: int) -> dict[str, float]:
    """Bits per byte of pieces of `length` bytes with no code and given the encoder's, and the bits of the code.

    Nothing for a network that knows no codes. The loss given the code is no code length: the code has to be added.
    """
    if model.segment is None:
        return {}
    pieces = text[:, : text.shape[1] // length * length].reshape(-1, length) if text.shape[1] > length else text
    ids = torch.from_numpy(pieces.astype(np.int64)).to(model.head.weight.device)
    every = torch.full((len(ids),), model.segment.dims, device=ids.device)
    found = dict[str, float]()
    with torch.compiler.set_stance("force_eager"):
        for name, sent in {"piece_bits": torch.zeros_like(every), "piece_bits_given_code": every}.items():
            nats = 0.0
            for rows, dims in zip(ids.split(STREAMS), sent.split(STREAMS), strict=True):
                logits = model(F.pad(rows, (1, 0), value=NEWLINE)[:, :-1], dims).flatten(0, 1)
                nats += float(F.cross_entropy(logits, rows.flatten(), reduction="sum"))
            found[name] = nats / math.log(2) / pieces.size
    return found | {"piece_bits_of_code": model.segment.dims * math.log2(model.segment.levels) / pieces.shape[1]}


def integer_bits(network: IntegerNetwork, text: NDArray[np.uint8]) -> float:
    """The same as `float_bits` under the integer network."""
    return network_bits(network, text) / text.size
