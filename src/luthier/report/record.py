"""What a folder holds: a run, a recipe of numbered stage runs, or runs to compare; read once, in plain values."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.core.run import RunFolder
from luthier.report.curves import Row, latest_by_step

DIGITS = re.compile(r"([0-9]+)")
STAGE = re.compile(r"\d+-(.+)")  # 01-pretrain


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run as the report sees it. `anchor` is unique on the page and a valid id."""

    name: str
    anchor: str
    verb: str
    model: str
    date: str
    state: str
    status: str
    config: Any
    env: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Mapping[str, list[Row]]
    samples: list[dict[str, Any]]

    @property
    def train(self) -> list[Row]:
        """Rows of training steps, in order."""
        return self.rows.get("train", [])

    @property
    def held_out(self) -> list[Row]:
        """Rows of evaluations during the run, in order."""
        return self.rows.get("eval", [])

    @property
    def title(self) -> str:
        """Verb and model, as far as they are known."""
        return " · ".join(filter(None, (self.verb or self.name, self.model)))


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run (or the parent of a recipe's stages)."""
    return (folder / "config.yaml").is_file()


def stages(folder: Path) -> list[Path]:
    """The numbered stage runs of a recipe folder, in order; empty when it is no recipe."""
    return [path for path in runs(folder) if STAGE.fullmatch(path.name)]


def runs(folder: Path) -> list[Path]:
    """The run folders directly inside a folder, by name, with numbers in numeric order (lr-3 before lr-10)."""
    found = [path for path in folder.iterdir() if path.is_dir() and is_run(path)] if folder.is_dir() else []
    return sorted(
        found,
        key=lambda path: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in DIGITS.split(path.name)
        ],
    )


def layout(folder: Path) -> str:
    """'recipe', 'run' or 'comparison'; DataError when the folder holds no run at all."""
    if stages(folder):
        return "recipe"
    if is_run(folder):
        return "run"
    if runs(folder):
        return "comparison"
    what = "holds no run (no config.yaml, here or one level down)" if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: {what}", hint="give the --out of an earlier run, or a folder of such runs")


def read(folder: Path) -> Record:
    """Read one run folder. DataError or ConfigError when a file in it is damaged."""
    run = RunFolder.read(folder)
    config, summary, rows = run.config, run.summary, by_kind(run.metrics())
    state, status = run_state(folder, finished=bool(summary), rows=rows)
    name = folder.resolve().name
    stage = STAGE.fullmatch(name)
    return Record(
        name=name,
        anchor="run-" + re.sub(r"[^A-Za-z0-9_-]", "-", name),
        verb=str(summary.get("verb") or (stage[1] if stage else "")),
        model=model_name(config),
        date=str(run.env.get("started", "")),
        state=state,
        status=status,
        config=config,
        env=run.env,
        summary=summary,
        rows=rows,
        samples=sorted(run.samples(), key=lambda sample: sample.get("step", 0), reverse=True),
    )


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[Row]]:
    """Rows of each kind, in order of their step."""
    kinds = dict.fromkeys(str(row.get("kind", "")) for row in rows)
    return {kind: latest_by_step([row for row in rows if row.get("kind", "") == kind]) for kind in kinds}


def run_state(folder: Path, *, finished: bool, rows: Mapping[str, list[Row]]) -> tuple[str, str]:
    """('finished' | 'running' | 'interrupted', the sentence that says where)."""
    if finished:
        return "finished", "finished"
    steps = [row["step"] for kind in rows.values() for row in kind if isinstance(row.get("step"), int)]
    where = f"at step {max(steps):,}" if steps else "before its first row"
    if is_being_written(folder):
        return "running", f"running, {where}"
    return "interrupted", f"interrupted {where}"


def is_being_written(folder: Path) -> bool:
    """Whether a live process holds the run's lock. The lock is only tried, and given back at once."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def model_name(config: Any) -> str:
    """What the config calls its model: a name or path as text, or the size of a model that is made."""
    if not isinstance(config, Mapping):
        return ""
    model = config.get("model") or config.get("size") or ""
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("size") or ""
    return Path(str(model)).name if model else ""
