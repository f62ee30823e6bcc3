"""`luthier compress FILE…`: lossless; on English smaller than PPMd and about as small as zpaq, but slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luthier.cli.archives import (
    STANDARD,
    SUFFIX,
    check_files,
    open_input,
    open_network,
    open_output,
    row,
    shown_progress,
    sizes,
)
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.entropy.codec.container import Summary, compress


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Compress files losslessly to FILE.lut. Any bytes will do; text gains most."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files; - is standard input, which goes to standard output unless -o names a file."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; by default beside the input, with .lut added."""
    stdout: Annotated[bool, tyro.conf.arg(aliases=["-c"])] = False
    """Write to standard output."""
    force: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace existing files, write to a terminal, and compress what is named .lut already."""
    keep: Annotated[bool, tyro.conf.arg(aliases=["-k"])] = False
    """Keep the input, which is the default; only there to refuse --rm."""
    rm: bool = False
    """Remove each input once its output is complete."""
    model: str = "auto"
    """Network that helps: auto is luthier's own, if this version has one; none; or a network file."""
    verify: bool = True
    """Decode all that was encoded before it is written; takes as long again."""

    def __post_init__(self) -> None:
        check_files(self.files, self.out, stdout=self.stdout, rm=self.rm)
        if self.keep and self.rm:
            raise ConfigError("--keep and --rm contradict each other", hint="give one of them")


def run(config: CompressConfig, console: Console) -> None:
    """Compress every file; the first that cannot be ends it, and those before it are done."""
    rows = []
    for name in config.files:
        to_stdout = config.stdout or (name == STANDARD and config.out is None)
        if to_stdout and console.as_json:
            raise ConfigError("--json and the compressed bytes both go to standard output", hint="give -o FILE")
        if name.endswith(SUFFIX) and not config.force:
            raise ConfigError(f"{name} is compressed already, by its name", hint="add -f to compress it once more")
        path = None if to_stdout else config.out or Path(name + SUFFIX)
        summary = _compress(config, name, path, console)
        (console.status if to_stdout else console.print)(f"{path or name}: {sizes(summary)}")
        rows.append(row(name, summary))
        if config.rm:
            Path(name).unlink()
    console.result({"files": rows})


def _compress(config: CompressConfig, name: str, path: Path | None, console: Console) -> Summary:
    with (
        open_input(name) as (source, size),
        open_output(path, force=config.force, like=name) as target,
        shown_progress(console, size, name) as progress,
    ):
        network = open_network(config.model)
        return compress(source, target, size=size, network=network, verify=config.verify, progress=progress)
