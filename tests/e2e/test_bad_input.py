"""What goes wrong outside luthier: one message, one hint, exit code 2 (130 for Ctrl-C), and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.core.run import RunFolder
from luthier.data.shards import write_shards
from luthier.data.tokenizer import train_bpe

Command = Callable[..., Any]


NO_WORK = ("env.json", ".lock", "config.yaml", "tokenizer_config.json")  # these only say who came last, and where


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that holds work."""
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NO_WORK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished tiny run that may be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def again(text_file: Path, tiny: list[str], luthier: Command) -> Command:
    """The command that made the run, into another folder and with more options."""
    return lambda out, *more: luthier("pretrain", "--data", text_file, "--out", out, *tiny, *more)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no text in it"),
        (b" \n\n \n", "no text in it"),
        (b"caf\xe9 au lait\n" * 50, "not UTF-8 text: byte 0xe9 at offset 3"),
        (b"short", "too few to divide"),
        (b"".join(b"%d words only.\n\n" % n for n in range(99)), "supports a vocabulary of"),
    ],
)
def test_a_corpus_that_cannot_be_used(
    luthier: Command, tiny: list[str], tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    outcome = luthier("pretrain", "--data", tmp_path / "bad.txt", "--out", tmp_path / "run", *tiny)
    assert outcome.code == 2
    assert told in outcome.error
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_a_corpus_that_is_not_there_can_be_mended_with_the_same_folder(
    luthier: Command, text_file: Path, tiny: list[str], tmp_path: Path
) -> None:
    wrong = text_file.with_name("texd.txt")
    outcome = luthier("pretrain", "--data", wrong, "--out", tmp_path / "run", *tiny)
    assert outcome.code == 2
    assert "(did you mean 'text.txt'?)" in outcome.error
    mended = luthier("pretrain", "--data", text_file, "--out", tmp_path / "run", *tiny, "--stop-after", "1")
    assert mended.code == 130
    assert "stopped at step 1 of 4, state saved" in mended.error


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("stesp: 4", "stesp: no such setting (did you mean 'steps'?)"),
        ("steps: many", "steps: got str 'many', expected int"),
        ("betas: 0.9", "betas: got float 0.9, expected a list"),
        ("steps: [4", "not valid YAML"),
        ("steps: 4\nsteps: 5", "'steps' is there twice"),
    ],
)
def test_a_config_file_that_is_wrong(luthier: Command, tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    outcome = luthier("pretrain", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert told in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "many"], "--steps: got 'many', expected int"),
        (["--betas", "0.9"], "--betas: got '0.9', expected float float"),
        (["--schedule", "cosin"], "(did you mean 'cosine'?)"),
        (["--size", "huge"], "size: got 'huge', expected one of pico, nano, tiny, small, 3b"),
        (["--stesp", "4"], "(did you mean '--steps'?)"),
        (["--steps", "0"], "steps: got 0, expected more than 0"),
        (["--held-out", "2"], "held_out: got 2.0, expected 0 to 1"),
        (["surplus"], "Unrecognized options: surplus"),
        (["--config", "absent.yaml"], "absent.yaml: no such file"),
    ],
)
def test_a_command_line_that_is_wrong(luthier: Command, arguments: list[str], told: str) -> None:
    outcome = luthier("pretrain", *arguments)
    assert outcome.code == 2
    assert told in outcome.error
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 2


@pytest.mark.parametrize("arguments", [["pretrain"], ["eval", "m"], ["tour"], ["chat", "m", "--prompt", "x"]])
def test_torch_that_is_not_installed(luthier_without_torch: Command, arguments: list[str], tmp_path: Path) -> None:
    out = [] if arguments[0] == "chat" else ["--out", tmp_path / "run"]
    outcome = luthier_without_torch(*arguments, *out)
    assert outcome.code == 2
    assert outcome.error == "this needs the package 'torch', which is not installed"
    assert outcome.err.splitlines()[-1] == "  hint: pip install 'luthier[torch]'"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_weights_that_are_truncated(luthier: Command, run: Path, size: int) -> None:
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    outcome = luthier("eval", run / "model", "--data", run / "data" / "held-out")
    assert outcome.code == 2
    assert "model.safetensors: not a complete safetensors file" in outcome.error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_folder_with_a_broken_file(luthier: Command, run: Path, name: str) -> None:
    (run / "model" / name).write_text('{"half')
    outcome = luthier("eval", run / "model", "--data", run / "data" / "held-out")
    assert outcome.code == 2
    assert str(run / "model") in outcome.error


def test_a_model_folder_that_is_missing(luthier: Command, run: Path) -> None:
    outcome = luthier("eval", run / "modle", "--data", run / "data" / "held-out")
    assert outcome.code == 2
    assert "(did you mean 'model'?)" in outcome.error


@pytest.mark.parametrize("name", ["state.json", "__0_0.distcp", ".metadata"])
def test_a_training_state_that_is_truncated(again: Command, run: Path, name: str) -> None:
    damaged = run / "checkpoints" / "step-00000004" / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    before = contents(run)
    outcome = again(run)
    assert outcome.code == 2
    assert "step-00000004: cannot read this training state" in outcome.error
    assert contents(run) == before


def test_settings_that_differ_from_those_of_the_run(again: Command, run: Path) -> None:
    before = contents(run)
    outcome = again(run, "--learning-rate", "0.5")
    assert outcome.code == 2
    assert "learning_rate: 0.004 -> 0.5" in outcome.error
    assert contents(run) == before


def test_a_folder_of_something_else(again: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    outcome = again(tmp_path)
    assert outcome.code == 2
    assert "not empty and holds no run" in outcome.error
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_token_shards_of_another_tokenizer(again: Command, luthier: Command, run: Path, text_file: Path) -> None:
    shards = run.parent / "shards"
    write_shards([text_file.read_text()], train_bpe([text_file.read_text()], 280), shards, source="other")
    for outcome in (
        luthier("eval", run / "model", "--data", shards),
        luthier(
            "pretrain", "--data", shards, "--tokenizer", run / "model", "--eval-data", shards, "--out", shards / "x"
        ),
    ):
        assert outcome.code == 2
        assert "the tokens of other were made by tokenizer" in outcome.error


@pytest.mark.parametrize("syncs", [0, 3, 12, 20])
def test_a_disk_that_fills_up(again: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int) -> None:
    """The disk takes so many more files, then none; with space again, the same command finishes the run."""
    sync, left = os.fsync, [syncs]

    def fill(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    outcome = again(tmp_path / "run", "--checkpoint-every", "1")
    assert outcome.code == 2
    assert "the disk is full" in outcome.error
    steps = RunFolder(tmp_path / "run").checkpoint_steps()
    monkeypatch.undo()
    resumed = again(tmp_path / "run", "--checkpoint-every", "1")
    assert resumed.code == 0, resumed.err
    assert (f"resuming at step {steps[-1]}" in resumed.err) if steps else ("resuming" not in resumed.err)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_ctrl_c_saves_the_state_and_the_same_command_goes_on(
    luthier: Command, text_file: Path, tiny: list[str], tmp_path: Path
) -> None:
    out, long = tmp_path / "run", [*tiny, "--log-every", "1"]
    long[long.index("--steps") + 1] = "100000"
    arguments = ["pretrain", "--data", str(text_file), "--out", str(out), *long]
    with subprocess.Popen([sys.executable, "-m", "luthier", *arguments], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not logged(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    *_, message, hint = err.splitlines()
    (step,) = RunFolder.read(out).checkpoint_steps()
    assert message == f"luthier: stopped at step {step} of 100000, state saved"
    assert hint == "  hint: run the same command again to go on from there"
    resumed = luthier(*arguments, "--stop-after", "2")
    assert f"resuming at step {step}" in resumed.err
    assert resumed.code == 130
    assert logged(out) == list(range(1, step + 3))


def logged(out: Path) -> list[int]:
    """The steps that a run has logged so far."""
    return [row["step"] for row in RunFolder(out).metrics("train")]


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null/x", "x" * 300])
def test_an_out_that_cannot_be_made(again: Command, out: str) -> None:
    outcome = again(out)
    assert outcome.code == 2
    assert out in outcome.error
