"""kill -9 at the worst moments costs at most the work since the last whole checkpoint, and never that checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# Runs the command line, but dies like kill -9 at one place of the save that follows the second one.
DIE_IN_A_SAVE = """
import os, signal, sys
from luthier.learn import state
from luthier.cli.main import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

saves = 0
whole_save = state.save_state

def save_state(*arguments):
    global saves
    saves += 1
    if saves == 2:
        setattr({where}, {name!r}, die)
    whole_save(*arguments)

from luthier.learn import loop
loop.save_state = save_state
sys.exit(main(sys.argv[1:]))
"""
MOMENTS = {
    "before the tensors": ("state.dcp", "save"),
    "after the tensors": ("state", "write_json"),
    "before the rename": ("state", "promote_folder"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(runs, moment):
    where, name = MOMENTS[moment]
    folder = f"killed-{name}"
    code = DIE_IN_A_SAVE.format(where=where, name=name)
    died = subprocess.run([sys.executable, "-c", code, *runs.arguments(folder)], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    checkpoints = runs.folder / folder / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-????????")] == ["step-00000002"]
    runs.finish(folder)
    assert runs.losses(folder) == runs.losses("straight")
    assert not list(checkpoints.glob("*.partial"))


def test_killed_while_training(runs):
    command = [sys.executable, "-m", "luthier", *runs.arguments("killed", steps=400, checkpoint_every=5, eval_every=0)]
    metrics = runs.folder / "killed" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = len(runs.losses("killed"))
    changes = {"steps": 400, "checkpoint_every": 5, "eval_every": 0}
    runs.finish("killed", **changes, stop_after=10, code=130)
    resumed = len(runs.losses("killed")) - 10
    assert reached - 6 <= resumed <= reached + 1  # at most one interval was lost
    runs.finish("straight-400", **changes, stop_after=resumed + 10, code=130)
    assert runs.losses("killed") == runs.losses("straight-400")
