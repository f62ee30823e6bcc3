"""`luthier report`: one self-contained HTML file from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luthier.core.console import Console
from luthier.report.html import write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a run, a recipe or a folder of runs as one HTML file that needs no network and no script."""

    run: tyro.conf.Positional[Path]
    """Run folder, recipe folder, or a folder that holds runs to compare."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; by default report.html inside the folder."""


def run(config: ReportConfig, console: Console) -> None:
    """Write the report and say where it is."""
    path = write_report(config.run, config.out)
    console.print(f"report: {path}")
    console.result({"report": str(path)})
