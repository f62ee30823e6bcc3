from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier as package
from luthier.cli import env as env_verb
from luthier.cli.main import OPTIONS, VERBS, load_config, main
from luthier.core.errors import ConfigError, Interrupted

Command = Callable[..., Any]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_and_option(luthier: Command, arguments: list[str]) -> None:
    outcome = luthier(*arguments)
    assert outcome.code == 0
    words = outcome.out.split()
    assert {*VERBS, *OPTIONS, "--config"} <= set(words)


def test_version(luthier: Command) -> None:
    assert luthier("--version").out == f"luthier {package.__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True)
    assert done.stdout == f"luthier {package.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_config_a_run_and_help(luthier: Command, verb: str) -> None:
    assert callable(importlib.import_module(VERBS[verb].module).run)
    outcome = luthier(verb, "--help")
    assert outcome.code == 0
    assert f"usage: luthier {verb}" in outcome.out
    assert str(load_config(verb).__doc__).split(".")[0].split(":")[0] in " ".join(outcome.out.split())


def test_stages_have_a_run_folder() -> None:
    for name, verb in VERBS.items():
        if verb.stage:
            assert "out" in load_config(name).__dataclass_fields__  # type: ignore[attr-defined]


def test_an_unknown_verb_is_corrected(luthier: Command) -> None:
    outcome = luthier("pretrian")
    assert outcome.code == 2
    assert outcome.error == "'pretrian': no such verb (did you mean 'pretrain'?)"


def test_json_prints_one_object(luthier: Command) -> None:
    outcome = luthier("env", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["packages"]["luthier"] == package.__version__


def test_a_dry_run_that_is_none_is_refused(luthier: Command) -> None:
    assert luthier("env", "--dry-run").error == "env has no dry run"


def test_a_dry_run_needs_no_torch(luthier_without_torch: Command) -> None:
    outcome = luthier_without_torch("pretrain", "--size", "3b", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["parameters"] == "3,112,675,840"


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("two\nlines", hint="a\nb"), 2, "two lines"),
        (Interrupted("stopped at step 3", hint="again"), 130, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (RuntimeError("writer failed: No space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "x/y: permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y"), 2, "x/y: not a directory"),
    ],
)
def test_errors_become_two_lines_and_a_code(
    luthier: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    monkeypatch.setattr(env_verb, "run", raising(error))
    outcome = luthier("env")
    assert outcome.code == code
    assert outcome.error.startswith(told)


def test_a_full_disk_is_seen_behind_another_error(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = RuntimeError("unexpected pos 704 vs 598")
    wrapped.__context__ = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(env_verb, "run", raising(wrapped))
    assert luthier("env").error.startswith("the disk is full")


def test_debug_shows_the_traceback_and_a_bug_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_verb, "run", raising(ConfigError("bad", hint="better")))
    with pytest.raises(ConfigError):
        main(["env", "--debug"])
    monkeypatch.setattr(env_verb, "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_other_ranks_are_silent_but_name_themselves_in_errors(
    luthier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    outcome = luthier("env")
    assert (outcome.out, outcome.err) == ("", "")
    assert luthier("env", "--dry-run").err.startswith("luthier (rank 1): ")


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m luthier env | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""


def test_a_path_that_cannot_be_a_run_folder_is_refused(luthier: Command, text_file: Path) -> None:
    outcome = luthier("eval", "org/name", "--out", text_file)
    assert outcome.code == 2
    assert outcome.error == f"{text_file}: file exists"
