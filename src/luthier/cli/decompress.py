"""`luthier decompress FILE.lut…`: the original bytes, or an error that says where the file is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luthier.cli.archives import (
    STANDARD,
    SUFFIX,
    check_files,
    network_finder,
    open_input,
    open_output,
    row,
    shown_progress,
    sizes,
)
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.entropy.codec.container import Summary, decompress, read_summary


@dataclass(frozen=True, kw_only=True)
class DecompressConfig:
    """Restore the files that `luthier compress` made."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files named .lut; - is standard input, which goes to standard output unless -o names a file."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; by default the name of the input without .lut."""
    stdout: Annotated[bool, tyro.conf.arg(aliases=["-c"])] = False
    """Write to standard output."""
    force: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace existing files, and write to a terminal."""
    keep: Annotated[bool, tyro.conf.arg(aliases=["-k"])] = False
    """Keep the input, which is the default; only there to refuse --rm."""
    rm: bool = False
    """Remove each input once its output is complete."""
    model: str = "auto"
    """Network file, for inputs that were compressed with another network than luthier's own."""

    def __post_init__(self) -> None:
        check_files(self.files, self.out, stdout=self.stdout, rm=self.rm)
        if self.keep and self.rm:
            raise ConfigError("--keep and --rm contradict each other", hint="give one of them")


def run(config: DecompressConfig, console: Console) -> None:
    """Restore every file; the first that cannot be ends it, and those before it are done."""
    rows = []
    for name in config.files:
        to_stdout = config.stdout or (name == STANDARD and config.out is None)
        if to_stdout and console.as_json:
            raise ConfigError("--json and the original bytes both go to standard output", hint="give -o FILE")
        if not to_stdout and config.out is None and not name.endswith(SUFFIX):
            raise ConfigError(f"{name}: the name does not end in {SUFFIX}", hint="say where to write with -o")
        path = None if to_stdout else config.out or Path(name.removesuffix(SUFFIX))
        summary = _decompress(config, name, path, console)
        (console.status if to_stdout else console.print)(f"{path or name}: {sizes(summary)}")
        rows.append(row(name, summary))
        if config.rm:
            Path(name).unlink()
    console.result({"files": rows})


def _decompress(config: DecompressConfig, name: str, path: Path | None, console: Console) -> Summary:
    with open_input(name) as (source, size), open_output(path, force=config.force, like=name) as target:
        length = None
        if size is not None:  # a regular file: its index tells how much there is to do, and whether it is whole
            length = read_summary(source).size
            source.seek(0)
        with shown_progress(console, length, name) as progress:
            return decompress(source, target, find_network=network_finder(config.model), progress=progress)
