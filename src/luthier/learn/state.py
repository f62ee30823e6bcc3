"""Everything that a resume needs, in one place: weights, Adam moments, step, tokens, seconds, data cursor.

There is no generator state to keep: the loop seeds each step by its number.

Saved with torch.distributed.checkpoint: each rank writes its shards, and a state saved on N ranks loads on M. A state
is written under a temporary name and renamed when whole, so a crash while saving cannot cost an older state.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from luthier.core.console import Console
from luthier.core.errors import CheckpointError
from luthier.core.files import TEMPORARY, promote_folder, read_json, write_json
from luthier.core.run import RunFolder
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights


@dataclass
class TrainState:
    """A training run between two steps. `cursor` is the data order's own state; `step` counts finished updates."""

    weights: Weights
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cursor: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name, as DCP reads and writes them."""
        _materialize_moments(self.optimizer)
        moments = {name: dict(self.optimizer.state[p]) for name, p in self.weights.masters.items()}
        return {"model": {name: p.detach() for name, p in self.weights.masters.items()}, "optimizer": moments}

    def counters(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "cursor": self.cursor}


def _materialize_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the tensors of parameters that had no update yet, with an update that changes nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if not optimizer.state.get(p)]
    if not new:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in parameters:
        p.grad = None
    for p in new:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    for p in new:
        optimizer.state[p]["step"].zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def save_state(state: TrainState, folder: Path, who: Ranks) -> None:
    """Write the state to `folder`, all ranks together; whole or not at all."""
    partial = folder.with_name(folder.name + TEMPORARY)
    if who.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    who.barrier()
    with _quiet_dcp(), _first_failure():
        dcp.save(state.tensors(), checkpoint_id=partial, no_dist=who.world_size == 1)
    if who.is_main:
        write_json(partial / "state.json", state.counters())
        promote_folder(partial, folder)
    who.barrier()


def load_state(state: TrainState, folder: Path, who: Ranks) -> None:
    """Fill `state` in place from `folder`, whatever the number of ranks that wrote it.

    Raises CheckpointError when files are missing or damaged, or belong to another model.
    """
    counters = _load(state, folder, who, hint=f"remove {folder} to resume from the checkpoint before it")
    state.step, state.tokens, state.seconds = counters["step"], counters["tokens"], counters["seconds"]
    state.cursor = counters["cursor"]


def inherit_state(state: TrainState, folder: Path, who: Ranks) -> int:
    """Take weights and moments from another run's training state, and return the step it was saved at.

    Step, tokens, seconds and data cursor of `state` stay. The optimizer's own count of updates comes with the moments.
    Raises CheckpointError as `load_state`.
    """
    counters = _load(state, folder, who, hint="start from another run, or from a model folder, with new moments")
    return int(counters["step"])


def _load(state: TrainState, folder: Path, who: Ranks, *, hint: str) -> dict[str, Any]:
    """Fill weights and moments from `folder`; its counters."""
    try:
        counters: dict[str, Any] = read_json(folder / "state.json")
        values = state.tensors()
        with _quiet_dcp(), _first_failure():
            dcp.load(values, checkpoint_id=folder, no_dist=who.world_size == 1)
    except Exception as error:  # DCP raises many kinds, some of them wrapped
        raise CheckpointError(f"{folder}: cannot read this training state ({_first_line(error)})", hint=hint) from error
    for name, parameter in state.weights.masters.items():
        state.optimizer.state[parameter].update(values["optimizer"][name])
    state.weights.publish()
    return counters


class Cursor(Protocol):
    """A data order that can be moved to where a state was saved, such as `WindowMixture`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def resume(
    state: TrainState, order: Cursor, checkpoints: Path, who: Ranks, run: RunFolder | None, console: Console
) -> None:
    """Load the newest training state, if there is one, and forget what was logged after it."""
    steps = sorted(int(path.name.split("-")[1]) for path in checkpoints.glob("step-????????"))
    if steps:
        load_state(state, checkpoints / f"step-{steps[-1]:08d}", who)
        order.load_state_dict(state.cursor)
        if who.is_main:
            console.status(f"resuming at step {state.step}")
    if run is not None:
        run.rewind(state.step)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the error at the bottom: DCP wraps it in an exception that is no `Exception`, so nobody would catch it."""
    try:
        yield
    except CheckpointException as wrapped:
        error: BaseException = next(iter(wrapped.failures.values()))[0]
        while error.__context__ is not None:  # a full disk, say, under the complaint about a half-written archive
            error = error.__context__
        raise error from wrapped


class _quiet_dcp(warnings.catch_warnings):
    """DCP warns that a single process is a single process."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered
