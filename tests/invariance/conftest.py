from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.cli.main import main

WORDS = ["the", "a", "of", "model", "token", "when", "returns", "value", "object", "string", "is", "called", "each"]
TINY = {
    "size": "nano",
    "vocab_size": 300,
    "sequence_length": 32,
    "batch_size": 8,
    "micro_batch_size": 8,
    "steps": 6,
    "warmup_steps": 2,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 2,
    "eval_every": 3,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small text file with word statistics that a model can learn."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(40, 120))) + ".\n" for _ in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("<|endoftext|>\n".join(documents))
    return path


def _option(key: str, value: object) -> list[str]:
    """An option of the command line; a switch has no value."""
    return [key] if value is True else [key, str(value)]


class Runs:
    """Training runs of the real command line, on one rank or several; `verb="extend"` for those of that verb."""

    def __init__(self, corpus: Path, folder: Path, launch: Callable[..., Any]) -> None:
        self.corpus, self.folder, self._launch = corpus, folder, launch

    def arguments(self, name: str, verb: str = "pretrain", **changes: object) -> list[str]:
        settings = {**TINY, "data": self.corpus, "out": self.folder / name, **changes}
        start = []
        if verb == "extend":
            start = [str(settings.pop("start"))]
            del settings["size"], settings["vocab_size"]
        pairs = [(f"--{key.replace('_', '-')}", value) for key, value in settings.items()]
        return [verb, *start, "--sample-prompts", *(part for key, value in pairs for part in _option(key, value))]

    def launch(self, name: str, ranks: int, **changes: object) -> tuple[int, str]:
        """Run on several ranks; exit code and output."""
        done = self._launch(ranks, "-m", "luthier", *self.arguments(name, **changes))
        return done.code, done.out + done.err

    def torchrun(self, name: str, ranks: int, **changes: object) -> None:
        """Run to the end under torchrun itself. Without -- it would take --start for its own --start-method."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*torchrun, "-m", "--", "luthier", *self.arguments(name, **changes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr

    def finish(self, name: str, *, code: int = 0, ranks: int = 1, **changes: object) -> None:
        """Run to the end, or to the exit code that is expected; one rank runs in this process."""
        if ranks == 1:
            assert main(self.arguments(name, **changes)) == code
            return
        returned, output = self.launch(name, ranks, **changes)
        assert returned == code, output

    def losses(self, name: str, kind: str = "train") -> list[float]:
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == kind]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model" / "model.safetensors")


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory, launch) -> Runs:
    """Runs share a folder for the session, so that a straight run is trained once and compared often."""
    shared = Runs(corpus, tmp_path_factory.mktemp("runs"), launch)
    shared.finish("straight")
    return shared
