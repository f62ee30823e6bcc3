"""The training loop: accumulate, clip, step, log, checkpoint, evaluate, stop. It owns clocks and ranks, and no maths.

The loss of a step is the sum over all its targets, divided once by their number over all micro-batches and ranks, so
the micro-batch size and the number of ranks do not change the result. A checkpoint is written before the evaluation of
the same step. Ctrl-C and SIGTERM finish the step, save, and stop.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.console import Advance, Console
from luthier.core.errors import UserError
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.learn.meters import Meter
from luthier.learn.objectives import IGNORED
from luthier.learn.parallel import Ranks
from luthier.learn.sequence_parallel import own_tokens
from luthier.learn.state import TrainState, save_state


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When to do what. Zero switches an interval off; the last step always logs, checkpoints and evaluates."""

    steps: int
    micro_batch_size: int
    """Sequences of one rank in one forward pass."""
    grad_clip: float
    """Largest L2 norm of the gradient; 0 does not clip."""
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_every: int
    """Steps between evaluations, each followed by samples."""
    stop_after: int = 0
    """Save and stop after this many steps of this process, as if interrupted."""

    @classmethod
    def of(cls, config: object) -> LoopSettings:
        """The settings of a verb that trains: its fields have the same names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(kw_only=True)
class Job:
    """What is trained, on what, and what is done on the way. `run` is None on all ranks but the main one."""

    objective: torch.nn.Module
    state: TrainState
    batch_at: Callable[[int], Mapping[str, NDArray[Any]]]
    """Step -> the rows that this rank works on (`Ranks.data_rank` says which): input_ids and targets (sequences, T),
    and what else the objective takes by row. Of each row, ranks that share it take their part in turn."""
    learning_rate: Callable[[int], float]
    seed: int
    """Decides the dropout of each step, in models that have any."""
    meter: Meter
    checkpoints: Path
    run: RunFolder | None
    evaluate: Callable[[], dict[str, Any]] | None = None
    sample: Callable[[], list[dict[str, Any]]] | None = None


class Diverged(UserError):
    """The loss or its gradient is no longer finite."""


def train(job: Job, settings: LoopSettings, who: Ranks, console: Console) -> bool:
    """Run until `settings.steps`; True when finished, False when stopped early with the state saved."""
    state, started = job.state, job.state.step
    with stop_requests() as stop, console.progress(settings.steps, "training", done=state.step) as advance:
        _look_again(job, settings, who)
        while state.step < settings.steps:
            row = _step(job, settings, who, stop)
            stopping = bool(row.pop("stop")) or state.step - started == settings.stop_after
            last = state.step == settings.steps
            _report(job, settings, row, advance, last=last)
            if last or stopping or _due(state.step, settings.checkpoint_every):
                _checkpoint(job, settings, who)
            if stopping and not last:
                return False
            _look(job, settings, who, last=last)
    return True


def _step(job: Job, settings: LoopSettings, who: Ranks, stop: threading.Event) -> dict[str, float]:
    """One optimizer update; its row of metrics."""
    state, began = job.state, time.perf_counter()
    # Dropout knows the global generators only. Seeded by the step, they need not be saved, on any device.
    torch.manual_seed(derive_seed(job.seed, "step", state.step, who.rank))
    batch = {
        name: torch.from_numpy(array).to(who.device, non_blocking=True)
        for name, array in own_tokens(job.batch_at(state.step), who).items()
    }
    own_targets = int((batch["targets"] != IGNORED).sum())
    targets, stop_votes = who.sum([own_targets, float(stop.is_set())])
    targets = max(targets, 1)  # a batch of nothing but prompts teaches nothing
    total = torch.zeros((), dtype=torch.float64, device=who.device)
    for start in range(0, len(batch["targets"]), settings.micro_batch_size):
        micro = {name: array[start : start + settings.micro_batch_size] for name, array in batch.items()}
        loss: Tensor = job.objective(**micro)
        # FSDP averages gradients over ranks; the factor world_size turns that back into the sum.
        (loss * (who.world_size / targets)).backward()
        state.weights.collect()
        total += loss.detach()
    grad_norm = _clip(job, settings)
    rate = job.learning_rate(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.weights.publish()
    loss_sum = who.sum([float(total)])[0]
    _check_finite(state.step, loss_sum, grad_norm)
    seconds = time.perf_counter() - began
    tokens = batch["input_ids"].numel() * who.world_size
    state.step += 1
    state.tokens += tokens
    state.seconds += seconds
    job.meter.add(tokens, seconds)
    return {"loss": loss_sum / targets, "learning_rate": rate, "grad_norm": grad_norm, "stop": stop_votes}


def _clip(job: Job, settings: LoopSettings) -> float:
    norm = torch.nn.utils.clip_grad_norm_(
        list(job.state.weights.masters.values()), settings.grad_clip or math.inf, foreach=True
    )
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _check_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(
            f"training diverged at step {step}: loss {loss}, gradient norm {grad_norm}",
            hint="lower the learning rate or lengthen the warm-up; earlier checkpoints are intact",
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(job: Job, settings: LoopSettings, row: dict[str, float], advance: Advance, *, last: bool) -> None:
    state = job.state
    if job.run is not None and (last or _due(state.step, settings.log_every) or state.step == 1):
        seconds = round(state.seconds, 3)
        job.run.log("train", step=state.step, tokens=state.tokens, seconds=seconds, **row, **job.meter.read())
    advance(1, note=f"loss {row['loss']:.3f} nats/token  {state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s")


def _checkpoint(job: Job, settings: LoopSettings, who: Ranks) -> None:
    save_state(job.state, job.checkpoints / f"step-{job.state.step:08d}", who)
    if job.run is not None:
        job.run.prune_checkpoints(settings.keep_checkpoints)


def _look(job: Job, settings: LoopSettings, who: Ranks, *, last: bool) -> None:
    """Evaluate and sample where due. All ranks evaluate; the main one writes."""
    state = job.state
    if not (last or _due(state.step, settings.eval_every)):
        return
    if job.evaluate is not None:
        row = job.evaluate()
        if job.run is not None:
            job.run.log("eval", step=state.step, tokens=state.tokens, seconds=round(state.seconds, 3), **row)
    if job.sample is not None and job.run is not None:
        job.run.write_sample(state.step, job.sample())


def _look_again(job: Job, settings: LoopSettings, who: Ranks) -> None:
    """Evaluate a resumed state where the run was stopped between saving it and evaluating it."""
    step = job.state.step
    seen = job.run is None or any(row["step"] == step for row in job.run.metrics("eval"))
    if who.sum([float(step > 0 and not seen)])[0]:
        _look(job, settings, who, last=step == settings.steps)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A SIGINT after that interrupts at once; launchers repeat SIGTERM."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
