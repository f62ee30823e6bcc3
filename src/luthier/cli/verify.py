"""`luthier verify FILE.lut…`: decode without writing, and compare every checksum."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from luthier.cli.archives import check_files, network_finder, open_input, row, shown_progress, sizes
from luthier.core.console import Console
from luthier.core.errors import DataError
from luthier.entropy.codec.container import decompress


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that compressed files give back what went into them."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files that `luthier compress` made; - is standard input."""
    model: str = "auto"
    """Network file, for inputs that were compressed with another network than luthier's own."""

    def __post_init__(self) -> None:
        check_files(self.files, None, stdout=False, rm=False)


def run(config: VerifyConfig, console: Console) -> None:
    """Check all files, and fail when one is damaged."""
    rows, faults = list[dict[str, object]](), list[tuple[str, DataError]]()
    for name in config.files:
        try:
            with open_input(name) as (source, size), shown_progress(console, size, name):
                summary = decompress(source, None, find_network=network_finder(config.model))
        except DataError as error:
            faults.append((name, error))
        else:
            console.print(f"{name}: good, {sizes(summary)}")
            rows.append(row(name, summary))
    if faults:
        told = "; ".join(f"{name}: {error}" for name, error in faults)
        raise DataError(told, hint=faults[0][1].hint)
    console.result({"files": rows})
