"""The run folder: what a run was asked, on which machine, what it measured, and where to resume.

    config.yaml  env.json  metrics.jsonl  summary.json  checkpoints/step-N/  samples/step-N.json  report.html

Writes are atomic or append-only. Rerunning the same config resumes; another config in the same folder is refused.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from luthier.core import config as config_
from luthier.core.env import snapshot
from luthier.core.errors import ConfigError, DataError
from luthier.core.files import (
    TEMPORARY,
    append_jsonl,
    atomic_write,
    read_json,
    read_jsonl,
    remove_leftovers,
    write_json,
)

WRITTEN_BY_OPEN = (".lock", "config.yaml", "env.json")


class RunFolder:
    """One run on disk. `open` writes and resumes, `read` only reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], *, may_change: Iterable[str] = ()) -> RunFolder:
        """Create the run folder, or continue it when it holds the same config (but for the keys in `may_change`).

        Raises ConfigError with the differences for another config, and when another process is writing to the folder.
        """
        run = cls(Path(path))
        run.path.mkdir(parents=True, exist_ok=True)
        run._check_is_run()
        run._acquire()
        try:
            run._check_same(config, may_change)
            for folder in (run.path, run.path / "data", run.path / "samples", run.checkpoints):
                remove_leftovers(folder)
            atomic_write(run.path / "config.yaml", config_.dump_yaml(dict(config)))
            write_json(run.path / "env.json", {"started": run.env.get("started", _now()), **_command(), **snapshot()})
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """An existing run folder; DataError when `path` is none."""
        if not (Path(path) / "config.yaml").is_file():
            raise DataError(
                f"{path}: not a run folder (it has no config.yaml)", hint="give the --out of an earlier run"
            )
        return cls(Path(path))

    def _check_is_run(self) -> None:
        """Refuse a folder with something else in it, so that nothing of the user's is ever mixed up with a run."""
        if not (self.path / "config.yaml").exists() and holds_work(self.path):
            raise ConfigError(
                f"{self.path} is not empty and holds no run", hint="choose another --out, or empty the folder first"
            )

    def _check_same(self, config: Mapping[str, Any], may_change: Iterable[str]) -> None:
        """Refuse another config, unless the folder holds no work yet: then a mistake in the settings can be mended.

        Prepared data are no work, but they follow from the settings: with others they are removed, to be made anew.
        """
        if not (self.path / "config.yaml").exists() or not holds_work(self.path):
            return
        changes = config_.diff(self.config, config, ignore=may_change)
        if changes and not holds_work(self.path, but_for="data"):
            shutil.rmtree(self.path / "data")
        elif changes:
            raise ConfigError(
                f"{self.path} holds a run with another config: {'; '.join(changes)}",
                hint="use the stored settings to resume, choose another --out, or remove the folder",
            )

    def _acquire(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"{self.path}: another process is writing to this run", hint="wait for it, or choose another --out"
            ) from error

    def close(self) -> None:
        """Let other processes write to this run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings of the run; DataError when they are damaged."""
        stored = config_.read_yaml(self.path / "config.yaml")
        if not isinstance(stored, dict):
            raise DataError(
                f"{self.path / 'config.yaml'}: expected a mapping of settings", hint="restore the file from the report"
            )
        return stored

    @property
    def env(self) -> dict[str, Any]:
        """Versions and machine of the last process that wrote to the run."""
        path = self.path / "env.json"
        return read_json(path) if path.exists() else {}

    @property
    def summary(self) -> dict[str, Any]:
        """The results of a finished run; empty before that."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Store the results: verb, headline (name -> text), tables (title, columns, rows, note)."""
        write_json(self.path / "summary.json", dict(summary))

    def log(self, kind: str, **values: Any) -> None:
        """Append one row to metrics.jsonl."""
        append_jsonl(self.path / "metrics.jsonl", {"kind": kind, **values})

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order, of one kind or all."""
        rows = read_jsonl(self.path / "metrics.jsonl")
        return [row for row in rows if kind is None or row.get("kind") == kind]

    def rewind(self, step: int) -> None:
        """Forget metrics and samples after `step`: the run resumes there and will write them again."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        atomic_write(self.path / "metrics.jsonl", rows)
        for path in (self.path / "samples").glob("step-*.json"):
            if int(path.stem.split("-")[1]) > step:
                path.unlink()

    def write_sample(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Store generated texts: a list of {"prompt", "text"}."""
        write_json(self.path / "samples" / f"step-{step:08d}.json", {"step": step, "samples": samples})

    def samples(self) -> list[dict[str, Any]]:
        """All stored samples, by step."""
        return [read_json(path) for path in sorted((self.path / "samples").glob("step-*.json"))]

    def checkpoint_steps(self) -> list[int]:
        """Steps with a whole training state, ascending. Half-written ones carry another name and do not count."""
        return sorted(int(path.name.split("-")[1]) for path in self.checkpoints.glob("step-????????") if path.is_dir())

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` training states."""
        for step in self.checkpoint_steps()[: -keep or None]:
            shutil.rmtree(self.checkpoints / f"step-{step:08d}")


def holds_work(folder: Path, but_for: str = "") -> bool:
    """Whether more is in a folder than what opening it as a run wrote, or a crash in that left, and `but_for`."""
    return any(
        holds_work(entry) if entry.is_dir() else entry.name not in WRITTEN_BY_OPEN and not entry.match(f".*{TEMPORARY}")
        for entry in folder.iterdir()
        if entry.name != but_for
    )


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _command() -> dict[str, str]:
    return {"command": shlex.join(["luthier", *sys.argv[1:]])}
