"""Training an entropy-estimation model, on the loop that pretraining uses.

What is minimized is the code length of the batch: nats of all tokens, plus the code's bits wherever a code was given.
The second part is a constant with no gradient; it is there so that no loss that is logged ever leaves it out. A share
of the segments goes without its code (the embedding dropout that makes one network both models). Which ones, and the
published noise, are drawn per segment from its number, so that neither micro-batches nor stopping change the result.

Departures from the published recipe: beta2 as theirs, 0.999, but the warm-up starts at a tenth of the peak; windows are
cut from packed text; fp32 or bf16 in place of fp16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.entropy.code_length import Measured, Segments, measure
from luthier.entropy.config import TrainEemConfig
from luthier.entropy.network import EntropyModel
from luthier.entropy.network_config import EntropyConfig
from luthier.learn.loop import Job, LoopSettings, train
from luthier.learn.meters import Meter, peak_flops, prefers_bf16
from luthier.learn.objectives import CHUNK, linear_cross_entropy
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.schedule import learning_rate
from luthier.learn.state import TrainState, resume

BETAS, EPSILON = (0.9, 0.999), 1e-8  # as published


class Batches(Protocol):
    """Where segments come from: `WindowMixture`, or a source that draws fresh ones."""

    def batch(self, step: int) -> Mapping[str, NDArray[np.int64]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class CodeLengthLoss(nn.Module):
    """The model and its loss as one module: summed nats of all tokens, and of the codes that were given."""

    def __init__(self, model: EntropyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, replaced: Tensor, uniform: Tensor) -> Tensor:
        """Scalar fp32; ids and targets (B, T) are the same tokens, replaced (B,) bool, uniform (B, m) in [0, 1)."""
        hidden, weight = self.model.training_hidden(input_ids, replaced, uniform), self.model.lm_head.weight
        chunk = CHUNK.get(input_ids.device.type, CHUNK["cpu"])
        nats = linear_cross_entropy(hidden.flatten(0, 1).to(weight.dtype), weight, targets.flatten(), chunk)
        return nats + (~replaced).sum() * (self.model.code_bits * math.log(2))


@dataclass(frozen=True)
class TrainedEem:
    """The outcome: the model in fp32, and what held-out text costs under it (None when stopped early)."""

    finished: bool
    model: EntropyModel
    held_out: Measured | None
    state: TrainState


def build_model(config: TrainEemConfig, vocab_size: int) -> EntropyModel:
    """A model with random weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        return EntropyModel(EntropyConfig.of(config.architecture(vocab_size)))


def train_eem(
    config: TrainEemConfig,
    model: EntropyModel,
    batches: Batches,
    held_out: Segments,
    *,
    who: Ranks,
    checkpoints: Path,
    run: RunFolder | None,
    console: Console,
) -> TrainedEem:
    """Train, resuming from the newest state in `checkpoints`. ConfigError for more than one rank."""
    if who.world_size > 1:
        raise ConfigError(
            f"train-eem runs in one process, got {who.world_size} ranks", hint="start it without torchrun, on one GPU"
        )
    low = _low_precision(config, who, console)
    objective = CodeLengthLoss(model).to(who.device).train()
    weights = Weights(objective, low)
    state = TrainState(weights, _optimizer(weights, config), cursor=batches.state_dict())
    resume(state, batches, checkpoints, who, run, console)
    job = Job(
        objective=objective,
        state=state,
        batch_at=partial(training_batch, batches, config),
        learning_rate=partial(
            learning_rate,
            schedule="linear",
            peak=config.learning_rate,
            warmup=config.warmup_steps,
            total=config.steps,
            final_fraction=0.0,
        ),
        seed=config.seed,
        meter=Meter(flops_per_token(model), peak_flops(who.device, low or torch.float32)),
        checkpoints=checkpoints,
        run=run,
        evaluate=lambda: metrics(_evaluate(model, held_out.head(config.eval_segments), config)),
    )
    finished = train(job, LoopSettings.of(config), who, console)
    weights.restore()
    return TrainedEem(finished, model.eval(), _evaluate(model, held_out, config) if finished else None, state)


def training_batch(batches: Batches, config: TrainEemConfig, step: int) -> dict[str, NDArray[Any]]:
    """The segments of a step, and by segment whether it goes without its code, and the noise of its numbers."""
    ids = batches.batch(step)["input_ids"]
    replaced, uniform = np.empty(len(ids), bool), np.empty((len(ids), config.dims), np.float32)
    for row in range(len(ids)):
        rng = np.random.default_rng(derive_seed(config.seed, "code", step * config.batch_size + row))
        replaced[row] = rng.random() < config.null_share
        uniform[row] = rng.random(config.dims, np.float32)
    return {"input_ids": ids, "targets": ids, "replaced": replaced, "uniform": uniform}


def metrics(measured: Measured) -> dict[str, Any]:
    """A row of held-out figures: of the cheaper way for each segment, and the bits per byte of the other two."""
    return {
        **measured.cheaper.row(),
        "null_bits_per_byte": measured.null.bits_per_byte.value,
        "code_bits_per_byte": measured.code.bits_per_byte.value,
        "coded": measured.coded,
    }


def flops_per_token(model: EntropyModel) -> float:
    """6 FLOPs per multiplied parameter, and 12 L D T for the attention scores or mixing products of each half."""
    eem = model.eem
    tables = sum(table.weight.numel() for table in (model.encoder_tokens, model.decoder_tokens))
    multiplied = sum(p.numel() for p in model.parameters()) - tables
    across = eem.encoder_layers * eem.encoder_width + eem.decoder_layers * eem.decoder_width
    return 6 * multiplied + 12 * across * eem.window


def _evaluate(model: EntropyModel, segments: Segments, config: TrainEemConfig) -> Measured:
    was_training = model.training
    model.eval()
    measured = measure(model, segments, batch_size=config.micro_batch_size, padding_side=config.padding_side)
    model.train(was_training)
    return measured


def _optimizer(weights: Weights, config: TrainEemConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        weights.masters.values(),
        lr=config.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _low_precision(config: TrainEemConfig, who: Ranks, console: Console) -> torch.dtype | None:
    """The dtype of compute, or None for fp32 throughout: on a CPU bf16 does not pay at these widths."""
    auto = config.precision == "auto" and who.device.type == "cuda" and prefers_bf16(who.device)
    low = torch.bfloat16 if config.precision == "bf16" or auto else None
    console.status(f"precision: {'fp32' if low is None else 'bf16 over fp32 masters'}")
    return low
