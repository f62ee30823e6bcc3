"""`luthier info FILE.lut…`: what a compressed file says of itself, without decoding it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import tyro

from luthier.cli.archives import STANDARD, check_files, open_input, row
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.entropy.codec.container import Summary, read_summary


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Print sizes, frames, network and digest of compressed files, from their headers and indexes."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files that `luthier compress` made."""

    def __post_init__(self) -> None:
        check_files(self.files, None, stdout=False, rm=False)
        if STANDARD in self.files:
            raise ConfigError("info needs files in which it can seek", hint="write standard input to a file first")


def run(config: InfoConfig, console: Console) -> None:
    """Read headers and indexes, and print a table for each file."""
    rows = []
    for name in config.files:
        with open_input(name) as (source, _):
            summary = read_summary(source)
        console.table(name, ("", "value"), _table(summary))
        rows.append({**row(name, summary), "sha256_first_half": summary.digest})
    console.result({"files": rows})


def _table(summary: Summary) -> list[list[str]]:
    kinds = Counter(kind for kind, _, _ in summary.frames)
    payload = sum(length for _, _, length in summary.frames)
    return [
        ["original", f"{summary.size:,} bytes"],
        ["compressed", f"{summary.compressed:,} bytes"],
        ["of that payload", f"{payload:,} bytes"],
        ["bits per byte", f"{summary.bits_per_byte:.4f}"],
        ["frames", ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"],
        ["network", summary.header.model or "none"],
        ["memory to decode", f"{(16 << summary.header.slots) / 2**20:,.1f} MiB and about 20 more"],
        ["SHA-256, first half", summary.digest],
    ]
