"""`luthier soup`: average the weights of models, tensor by tensor, and write a model folder and a report."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.starts import model_source
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import CheckpointError
from luthier.core.run import RunFolder
from luthier.train.soup_config import SoupConfig

if TYPE_CHECKING:
    from luthier.train.soup import Member


def run(config: SoupConfig, console: Console) -> None:
    """Average; under torchrun the main rank alone works, and the others wait for the folder."""
    from luthier.learn.parallel import ranks

    with ranks("cpu") as who, who.main_first():
        if who.is_main:
            _make(config, console)


def _make(config: SoupConfig, console: Console) -> None:
    from luthier.models.load import read_provenance, weight_hashes
    from luthier.train.soup import soup

    members = [_open(name) for name in config.models]
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config))) as run:
        parents: list[dict[str, Any]] = [
            {"model": str(member.folder), "share": share / sum(config.shares), "weights": weight_hashes(member.folder)}
            for member, share in zip(members, config.shares, strict=True)
        ]
        made = [read_provenance(member.folder) for member in members]
        provenance = {
            "verb": "soup",
            "chat": any(told.get("chat", not told) for told in made),
            "config": to_mapping(config),
            "parents": parents,
            "data": [],
            "env": run.env,
        }
        parameters = soup(members, config.shares, config.out / "model", provenance)
        _finish(config, run, parents, parameters, console)


def _open(name: str) -> Member:
    """A member by its folder. CheckpointError for a hub id: the weights are read from this machine's disk."""
    from luthier.data.tokenizer import load_tokenizer, tokenizer_digest
    from luthier.train.soup import Member

    folder = Path(model_source(name))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no model folder (it has no config.json)", hint="give folders of models; download those of the hub"
        )
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    return Member.open(folder, tokenizer_digest(load_tokenizer(folder)) if has_tokenizer else "")


def _finish(
    config: SoupConfig, run: RunFolder, parents: list[dict[str, Any]], parameters: int, console: Console
) -> None:
    from luthier.report.html import write_report

    rows = [
        [entry["model"], f"{entry['share']:.3f}", " ".join(digest[:12] for digest in entry["weights"].values())]
        for entry in parents
    ]
    table: dict[str, Any] = {"title": "Members", "columns": ["model", "share", "weights (SHA-256)"], "rows": rows}
    headline = {"models averaged": str(len(parents)), "parameters": f"{parameters:,}"}
    run.write_summary({"verb": "soup", "headline": headline, "tables": [table]})
    report, model = write_report(run.path), config.out / "model"
    console.table(**table)
    console.print(f"model: {model}")
    console.print(f"report: {report}")
    console.result({"members": parents, "parameters": parameters, "model": str(model), "report": str(report)})
