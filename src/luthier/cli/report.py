"""`luthier report`: one self-contained HTML file from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luthier.core.console import Console
from luthier.report.html import write_report
from luthier.report.traces import is_traces, write_traces


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a run, a recipe, a folder of runs or a trace of reasoning as one HTML file that needs no network."""

    run: tyro.conf.Positional[Path]
    """Run folder, recipe folder, a folder that holds runs to compare, or a trace
    (.jsonl; also a folder of nothing else)."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; by default report.html inside the folder, or beside the trace."""


def run(config: ReportConfig, console: Console) -> None:
    """Write the report and say where it is."""
    write = write_traces if is_traces(config.run) else write_report
    path = write(config.run, config.out)
    console.print(f"report: {path}")
    console.result({"report": str(path)})
