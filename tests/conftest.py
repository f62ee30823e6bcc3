"""What every test may use: the command line as a function, a small text, and one small trained run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, Outcome

from luthier.cli.main import main

# Models here are so small that a second thread only waits, most of all where other processes use the cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = (
    "the",
    "luthier",
    "planes",
    "top",
    "of",
    "violin",
    "until",
    "it",
    "rings",
    "tap",
    "wood",
    "spruce",
    "maple",
    "bow",
)
TINY = [
    *("--size", "nano", "--steps", "4", "--sequence-length", "32", "--batch-size", "4", "--micro-batch-size", "4"),
    *("--vocab-size", "300", "--warmup-steps", "1", "--eval-every", "0", "--precision", "fp32", "--device", "cpu"),
    *("--compile", "off"),
    "--sample-prompts",
]

WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from luthier.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def run_command(*arguments: str | Path) -> Outcome:
    """`luthier ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def luthier() -> Callable[..., Outcome]:
    """`luthier("eval", folder)` runs a command in this process and returns its Outcome."""
    return run_command


@pytest.fixture(scope="session")
def luthier_without_torch() -> Callable[..., Outcome]:
    """The same in a new process in which torch and transformers are not installed."""

    def run(*arguments: str | Path) -> Outcome:
        command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Commands on several ranks."""
    return Launcher(tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, launch: Launcher) -> Callable[..., list[dict[str, Any]]]:
    """`on_two_ranks([…], […])` runs commands one after the other on two ranks on the CPU; see two_ranks.py."""

    def run(*commands: list[str]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "commands.json").write_text(json.dumps(commands))
        done = launch(2, Path(__file__).with_name("two_ranks.py"), folder / "commands.json")
        assert done.code == 0, done.out + done.err
        first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
        assert [part["code"] for part in first] == [part["code"] for part in second]
        assert [part["held"] for part in first] == [part["held"] for part in second]
        return first

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options that make pretraining a matter of a second."""
    return TINY


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of paragraphs."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs, size = list[str](), 0
    while size < 20_000:
        paragraphs.append(" ".join(draw.choices(WORDS, k=draw.randint(20, 80))) + ".\n\n")
        size += len(paragraphs[-1])
    path.write_text("".join(paragraphs))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The run folder of a finished tiny pretraining; copy it before you change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    outcome = run_command("pretrain", "--data", text_file, "--out", out, *TINY)
    assert outcome.code == 0, outcome.err
    return out
