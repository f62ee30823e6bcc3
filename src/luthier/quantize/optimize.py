"""ParoQuant's two stages on one decoder layer (section 3.4): first scales and angles, then weights and grid.

Each stage minimises the distance between the layer's output on the quantized model's activations and the original's
output on its own. The best of all epochs on the validation windows is kept.

Departures, each off in the preset `paper`: rates rise before they fall, and a stage whose first epoch makes the
validation loss worse starts again at a quarter of its rates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.core.errors import CheckpointError
from luthier.learn.meters import prefers_bf16
from luthier.learn.schedule import learning_rate
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.gptq import hessians
from luthier.quantize.layer import Activations, LayerTask
from luthier.quantize.student import Student
from luthier.quantize.weights import QuantizedWeight

LOSSES = {"smooth-l1": F.smooth_l1_loss, "mse": F.mse_loss}
FINAL_FRACTION = 0.05  # of the peak rate, at the end of a stage
EPSILON = 1e-10  # AdamW's
RESTARTS = 2
Trained = Mapping[str, Sequence[nn.Parameter]]  # by name, one of each student


def paroquant(task: LayerTask) -> dict[str, QuantizedWeight]:
    """Quantize one layer: stage 1, codes from rounding or GPTQ, stage 2."""
    config = task.config
    parameters = dict(task.layer.named_parameters())
    students = [
        Student(bundle, bundle.stack(parameters), config, seed=config.seed + task.index) for bundle in task.bundles
    ]
    moments = hessians(task) if config.scale_start == "search" or config.start == "gptq" else {}
    for index, student in enumerate(students):
        if config.scale_start == "search" and index in moments:
            student.search_scales(moments[index])
    row: dict[str, Any] = {"layer": task.index, "loss_rounded": _validate(task, students)}
    rates = {"theta": config.learning_rate_transform}
    if config.scale_parameter != "none":
        rates["scale"] = config.learning_rate_transform
    row["loss_stage1"] = train_stage(task, students, rates, epochs=config.epochs[0], stage=1)
    for index, student in enumerate(students):
        student.fix_transform(moments.get(index) if config.start == "gptq" else None)
    row["loss_fixed"] = _validate(task, students)
    rates = {
        "weight": config.learning_rate_weight,
        "step": config.learning_rate_grid,
        "zero": config.learning_rate_grid,
    }
    row["loss_stage2"] = train_stage(task, students, rates, epochs=config.epochs[1], stage=2)
    task.log(row)
    return {name: weight for student in students for name, weight in student.export().items()}


def train_stage(
    task: LayerTask, students: Sequence[Student], rates: Mapping[str, float], *, epochs: int, stage: int
) -> float:
    """Train the named parameters of the students, keep the best epoch, and return its validation loss."""
    trained = {name: [getattr(student, name) for student in students] for name, rate in rates.items() if rate > 0}
    trained = {name: found for name, found in trained.items() if any(parameter.numel() for parameter in found)}
    initial = _validate(task, students)
    if not math.isfinite(initial):
        raise CheckpointError(
            f"layer {task.index}: the loss before stage {stage} is {initial}",
            hint="the model overflows on this text: check its weights, or use --precision fp32",
        )
    if not epochs or not trained:
        return initial
    before = _snapshot(trained)
    for attempt in range(RESTARTS + 1):
        slower = {name: rate * 0.25**attempt for name, rate in rates.items()}
        best = _run_epochs(task, students, trained, slower, epochs=epochs, initial=initial)
        if best is not None:
            return best
        task.log({f"restarts_stage{stage}": attempt + 1})
        _restore(trained, before)
    return initial


def _run_epochs(
    task: LayerTask,
    students: Sequence[Student],
    trained: Trained,
    rates: Mapping[str, float],
    *,
    epochs: int,
    initial: float,
) -> float | None:
    """The best validation loss, whose parameters are then in place; None if the guard sees the first epoch fail."""
    config = task.config
    groups = [{"params": parameters, "name": name} for name, parameters in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=EPSILON, weight_decay=config.weight_decay)
    best, kept = initial, _snapshot(trained)
    steps = math.ceil(len(task.inputs) / config.batch_size)
    with _trainable(trained):
        for epoch in range(epochs):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = _rate(config, rates[group["name"]], epoch * steps + step, epochs * steps)
                _backward(task, students, step * config.batch_size)
                optimizer.step()
                optimizer.zero_grad()
            loss = _validate(task, students)
            if config.guard and epoch == 0 and not loss <= initial:
                return None
            if loss < best:
                best, kept = loss, _snapshot(trained)
    _restore(trained, kept)
    return best


def _snapshot(trained: Trained) -> dict[str, list[Tensor]]:
    return {name: [parameter.detach().clone() for parameter in parameters] for name, parameters in trained.items()}


@torch.no_grad()
def _restore(trained: Trained, values: Mapping[str, Sequence[Tensor]]) -> None:
    for name, parameters in trained.items():
        for parameter, value in zip(parameters, values[name], strict=True):
            parameter.copy_(value)


def _rate(config: QuantizeConfig, peak: float, step: int, total: int) -> float:
    return learning_rate(
        step,
        schedule="cosine",
        peak=peak,
        warmup=int(config.warmup * total),
        total=total,
        final_fraction=FINAL_FRACTION,
    )


def _backward(task: LayerTask, students: Sequence[Student], start: int) -> None:
    """Gradients of one batch. The weights are made once; micro-batches add up their gradients before it goes on."""
    config = task.config
    stop = min(start + config.batch_size, len(task.inputs))
    made = {name: weight for student in students for name, weight in student.weights().items()}
    leaves = {name: weight.detach().requires_grad_() for name, weight in made.items()}
    for first in range(start, stop, config.micro_batch_size):
        last = min(first + config.micro_batch_size, stop)
        loss = _loss(task, leaves, task.inputs, task.targets, first, last) * ((last - first) / (stop - start))
        loss.backward()
    used = [name for name in made if leaves[name].grad is not None]
    torch.autograd.backward([made[name] for name in used], [leaves[name].grad for name in used])


def _loss(
    task: LayerTask, weights: Mapping[str, Tensor], inputs: Activations, targets: Activations, start: int, stop: int
) -> Tensor:
    hidden, target = inputs.read(start, stop), targets.read(start, stop)
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=_low_precision(task.config, hidden.device)):
        out = task.forward(hidden, weights)
    return LOSSES[task.config.loss](out.float(), target)


def _low_precision(config: QuantizeConfig, device: torch.device) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and prefers_bf16(device))


@torch.no_grad()
def _validate(task: LayerTask, students: Sequence[Student]) -> float:
    """Mean loss over the validation windows."""
    weights = {name: weight for student in students for name, weight in student.weights().items()}
    size, count, total = task.config.micro_batch_size, len(task.validation_inputs), 0.0
    for start in range(0, count, size):
        stop = min(start + size, count)
        loss = _loss(task, weights, task.validation_inputs, task.validation_targets, start, stop)
        total += float(loss) * (stop - start)
    return total / count


@contextlib.contextmanager
def _trainable(trained: Trained) -> Iterator[None]:
    parameters = [parameter for group in trained.values() for parameter in group]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
