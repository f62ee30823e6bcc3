"""What a command did, and launches of several ranks, which fork from a process that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

# What takes ranks seconds to import.
PRELOADED = (
    "luthier.cli.main",
    *(f"luthier.train.{name}" for name in ("pretrain", "extend", "sft", "dpo", "mathrl")),
    *(f"luthier.distill.{name}" for name in ("stages", "gad_trainer")),
)
OUTPUTS = {"out": 1, "err": 2}
GRACE = 30  # seconds that torchrun leaves other ranks when one has failed


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of an error that was told in exactly two lines at the end, without a traceback."""
        *before, message, hint = self.err.splitlines() or ["", ""]
        assert "Traceback" not in self.err, self.err
        assert re.match(r"luthier: \S", message), self.err
        assert re.match(r"  hint: \S", hint), self.err
        assert not any(line.startswith(("luthier:", "  hint:")) for line in before), self.err
        return message.removeprefix("luthier: ")


class Launcher:
    """`launch(2, "-m", "luthier", …)`: what torchrun does with it on this machine's CPU, without the imports.

    The ranks are forked from the server of multiprocessing, which imports once in a session. So they share the seed of
    string hashes, unlike torchrun's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._launches = folder, 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def __call__(self, ranks: int, *command: str | Path, timeout: float = 200) -> Outcome:
        """Exit code 1 when a rank failed, and what the ranks said, one after the other."""
        self._launches += 1
        folder = self._folder / str(self._launches)
        folder.mkdir()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "CUDA_VISIBLE_DEVICES": ""}
        processes = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            given = ([*map(str, command)], {**os.environ, **own}, folder)
            processes.append(self._context.Process(target=run_rank, args=given))
        code = run_together(processes, timeout)
        said = {name: [(folder / f"{rank}.{name}").read_text() for rank in range(ranks)] for name in OUTPUTS}
        return Outcome(code, "".join(said["out"]), "".join(said["err"]))


def run_rank(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """`python COMMAND` in this forked process, with its environment, and its outputs in files of the folder."""
    torch.set_num_threads(1)  # torchrun tells its ranks so before they import
    os.environ.clear()
    os.environ.update(environment)
    for name, stream in OUTPUTS.items():
        os.dup2(os.open(folder / f"{environment['RANK']}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    script, *arguments = command
    if script == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(script, run_name="__main__")


def run_together(processes: Sequence[BaseProcess], timeout: float) -> int:
    """0, or 1 when one failed: the others are told to end then, and are ended if they do not, as torchrun does it."""
    deadline, failed = time.monotonic() + timeout, False
    try:
        for process in processes:
            process.start()
        while alive := [process for process in processes if process.is_alive()]:
            if not wait([process.sentinel for process in alive], deadline - time.monotonic()):
                assert failed, f"{timeout} s are over"
                break
            if any(process.exitcode for process in processes) and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
                for process in alive:
                    process.terminate()
        return int(any(process.exitcode for process in processes))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
