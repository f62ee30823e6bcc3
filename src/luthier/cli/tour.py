"""`luthier tour`: a model's whole life on this machine, as the recipe `recipes/tour.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.cli.run import recipe_folder, run_recipe
from luthier.core.console import Console
from luthier.core.errors import require
from luthier.core.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class TourConfig:
    """Train a small model on the prose of this Python installation and see what it has learned."""

    size: Literal["nano", "tiny", "small"] = "nano"
    """The one dial. nano takes about 3 minutes on two cores; tiny and small are for more text than this."""
    out: Path = Path("runs/tour")
    """Folder of the run; the same command again resumes it."""


def run(config: TourConfig, console: Console) -> None:
    """Run the recipe and show what the model writes."""
    require("torch", "torch")
    recipe = recipe_folder() / "tour.yaml"
    run_recipe(recipe, config.out, (f"pretrain.size={config.size}",), console)
    samples = RunFolder.read(config.out / "01-pretrain").samples()
    for sample in samples[-1]["samples"] if samples else []:
        console.print(f"\n{sample['prompt']}|{sample['text']}")
    console.print(f"\nTalk to it: luthier chat {config.out / '01-pretrain' / 'model'}")
