"""`luthier inspect FOLDER`: where the bits of a quantized model go, and which programs can load it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from luthier.core.console import Console
from luthier.core.errors import CheckpointError

if TYPE_CHECKING:
    from luthier.quantize.inspect import Inspection, ModuleSizes


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Print what a quantized model consists of: bits per weight, rotations, and who else can read it."""

    model: tyro.conf.Positional[Path]
    """Folder of a quantized model, or the run folder that made it."""


def run(config: InspectConfig, console: Console) -> None:
    """Read the folder's headers and print the tables."""
    from luthier.quantize.inspect import inspect_checkpoint

    found = inspect_checkpoint(model_folder(config.model))
    for table in tables(found):
        console.table(**table)
    console.result(_plain(found))


def model_folder(path: Path) -> Path:
    """The model folder: as given, or `model` inside a run folder. Raises CheckpointError when there is none."""
    inside = path / "model"
    folder = inside if (inside / "config.json").is_file() and not (path / "config.json").exists() else path
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such model folder"
        raise CheckpointError(f"{path}: {what}", hint="give a folder that `luthier quantize` wrote")
    return folder


def tables(found: Inspection) -> list[dict[str, Any]]:
    """Tables for the console and for reports: bits, distributions, readers."""
    return [_bits_table(found), _format_table(found), _readers_table(found)]


def _bits_table(found: Inspection) -> dict[str, Any]:
    rows = [_module_row(group) for group in found.groups]
    rows.append(_module_row(dataclasses.replace(found.body, kind="body, all together")))
    rows += [[kind, "—", "—", "—", "—", _megabytes(size)] for kind, size in found.other_bytes.items() if size]
    rows.append(["files", "—", "—", "—", f"{found.bits_per_parameter:.3f}", _megabytes(found.file_bytes)])
    columns = ["", "modules", "codes, bits/weight", "metadata, bits/weight", "together", "size"]
    note = "Metadata: step sizes, zero points, angles, pairs and channel scales. "
    note += "The output head is the embedding matrix." if found.tied_head else ""
    return {"title": f"{found.folder}: bits per weight", "columns": columns, "rows": rows, "note": note.strip()}


def _module_row(sizes: ModuleSizes) -> list[str]:
    bits = [f"{value:.3f}" for value in (sizes.bits("codes"), sizes.metadata_bits, sizes.total_bits)]
    return [sizes.kind, f"{sizes.modules:,}", *bits, _megabytes(sum(sizes.bytes.values()))]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _format_table(found: Inspection) -> dict[str, Any]:
    groups = sum(found.zero_points)
    middle = max(range(len(found.zero_points)), key=found.zero_points.__getitem__)
    rows = [
        ["bits of a code", str(found.bits)],
        ["group size G", str(found.group_size)],
        ["rotation rounds K", str(found.rounds)],
        ["layout", found.layout],
        ["most frequent zero point", f"{middle} ({found.zero_points[middle] / groups:.0%} of {groups:,} groups)"],
        ["angles", f"rms {found.angles.rms:.3f}, largest {found.angles.largest:.3f} rad, {found.angles.idle:.0%} zero"],
        ["modules that share pairs", f"{found.shared_pairs:.0%}"],
        ["modules that share the whole transform", f"{found.shared_transforms:.0%}"],
    ]
    return {"title": "Format", "columns": ["", "value"], "rows": rows}


def _readers_table(found: Inspection) -> dict[str, Any]:
    rows = [["luthier (transformers, CPU and CUDA)", "yes", ""]]
    rows += [
        [reader.name, "no" if reader.reasons else "yes", "; ".join(reader.reasons)]
        for reader in sorted(found.readers, key=lambda reader: bool(reader.reasons))
    ]
    note = "From the readers' code and this folder's headers; none of them was run."
    return {"title": "Who can load it", "columns": ["program", "", "why not"], "rows": rows, "note": note}


def _plain(found: Inspection) -> dict[str, Any]:
    """All of it, for --json."""
    groups = (*found.groups, found.body)
    return {
        **dataclasses.asdict(found),
        "bits_per_weight": {group.kind: group.total_bits for group in groups},
        "bits_per_parameter": found.bits_per_parameter,
    }
