"""Run by the fixture `on_two_ranks`: commands on the ranks of one launch, which import everything once.

Of each command: its exit code, what it said, and the parts of the model and of Adam's moments that each rank held when
training ended, as [model, moments] for each training of the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from luthier.cli.main import main
from luthier.learn import tuning
from luthier.learn.parallel import ranks

gathered = tuning.final_weights


def part_here(tensors: Iterable[torch.Tensor]) -> float:
    """Elements on this rank over all elements."""
    found = list(tensors)
    here = sum(tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel() for tensor in found)
    return here / sum(tensor.numel() for tensor in found)


def run(commands: list[list[str]]) -> list[dict[str, Any]]:
    held: list[list[float]] = []

    def noted(trainer: Any) -> dict[str, torch.Tensor]:
        states = trainer.optimizer.state.values()
        moments = (state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
        held.append([part_here(trainer.model.parameters()), part_here(moments)])
        return gathered(trainer)

    tuning.final_weights = noted
    found = []
    for arguments in commands:
        held.clear()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(arguments)
        assert "ACCELERATE_USE_FSDP" not in os.environ  # which would divide the model of the next command
        found.append({"code": code, "said": said.getvalue(), "held": list(held)})
    return found


if __name__ == "__main__":
    given = Path(sys.argv[1])
    with ranks("cpu") as who:
        outcomes = run(json.loads(given.read_text()))
        (given.parent / f"rank-{who.rank}.json").write_text(json.dumps(outcomes))
