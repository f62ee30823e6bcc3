"""`luthier tour`: all five systems on this machine, as the recipe `recipes/tour.yaml`, and what came of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.cli.main import VERBS
from luthier.cli.run import Stage, paragraph, read_recipe, recipe_folder, run_recipe
from luthier.cli.tour_view import Done, lines
from luthier.core.console import Console
from luthier.core.errors import require
from luthier.core.files import read_json
from luthier.core.run import RunFolder

TRAIN = ("trl", "peft", "datasets", "accelerate")
"""Packages that the extra `train` adds."""
SAMPLE = 300
"""Characters of a sample that are shown."""


@dataclass(frozen=True, kw_only=True)
class TourConfig:
    """Train, measure, quantize, reason and distill with small models on this machine, and see what came of it."""

    size: Literal["nano", "tiny", "small"] = "nano"
    """Size of the first model. With nano the tour took 16 minutes on one busy core."""
    out: Path = Path("runs/tour")
    """Folder of the run; the same command again goes on where it stopped."""
    set: tuple[str, ...] = ()
    """Changes such as pretrain.steps=100 (stage name, setting, value)."""


def run(config: TourConfig, console: Console) -> None:
    """Run the recipe, then tell what each system did."""
    require("torch", "torch")
    recipe, changes = recipe_folder() / "tour.yaml", (f"pretrain.size={config.size}", *config.set)
    stages = read_recipe(recipe, config.out, changes)
    without = left_out(stages)
    for line in _told(without):
        console.status(line)
    run_recipe(recipe, config.out, changes, console, without=without)
    done = {stage.name: _read(stage) for stage in stages if stage.done.exists()}
    _show_sample(config.out / "01-pretrain", console)
    for line in [*lines(done, config.out), "", _took(stages), *_told(without)]:
        console.print(line)


def _show_sample(folder: Path, console: Console) -> None:
    """The beginning of what the first model wrote last."""
    for text in [text for sample in RunFolder.read(folder).samples() for text in sample["samples"][:1]][-1:]:
        console.print(f"\nWhat the first model writes after {text['prompt']!r}:")
        console.print(paragraph(text["text"][:SAMPLE], "  ", "  "))


def left_out(stages: Sequence[Stage]) -> list[str]:
    """Names of the stages that cannot run without the extra `train`, of those that need them, and of what serves none
    but these; empty where the extra is installed."""
    if all(importlib.util.find_spec(package) for package in TRAIN):
        return []
    out = set[str]()
    for stage in stages:
        if VERBS[stage.verb].extra == "train" or out & set(stage.needs):
            out.add(stage.name)
    for stage in reversed(stages):
        users = [other.name for other in stages if stage.name in other.needs]
        if users and out >= set(users):
            out.add(stage.name)
    return [stage.name for stage in stages if stage.name in out]


def _told(without: Sequence[str]) -> list[str]:
    if not without:
        return []
    return [
        f"left out: {', '.join(without)}",
        "they need TRL and peft: pip install 'luthier[train]', then the same command runs them alone",
    ]


def _took(stages: Sequence[Stage]) -> str:
    """How long the stages ran, together; of one that was interrupted its last part counts."""
    ran = [read_json(stage.done) for stage in stages if stage.done.exists()]
    minutes, worked = (sum(row[name] for row in ran) / 60 for name in ("seconds", "processor_seconds"))
    return f"{len(ran)} stages took {minutes:.1f} minutes, in which processors worked {worked:.1f}."


def _read(stage: Stage) -> Done:
    return Done(stage.folder, read_json(stage.done)["result"], RunFolder.read(stage.folder).summary)
