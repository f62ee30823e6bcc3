"""Files for `compress`, `decompress` and `verify`: names, standard streams, whole outputs, and the network to use."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.files import TEMPORARY
from luthier.entropy.codec.container import Summary
from luthier.entropy.codec.frames import Network, Progress

SUFFIX = ".lut"
STANDARD = "-"


def check_files(files: Sequence[str], out: Path | None, *, stdout: bool, rm: bool) -> None:
    """Raise ConfigError for a combination of files and options that cannot be meant."""
    if not files:
        raise ConfigError("no file was given", hint=f"name files, or {STANDARD} for standard input")
    if out is not None and (stdout or len(files) > 1):
        what = "--stdout" if stdout else f"{len(files)} files"
        raise ConfigError(f"-o {out} does not go with {what}", hint="leave out -o")
    if list(files).count(STANDARD) > 1 or (STANDARD in files and rm):
        raise ConfigError(
            "standard input can be read once, and not removed", hint=f"give {STANDARD} once, without --rm"
        )
    if rm and stdout:
        raise ConfigError("--rm does not go with --stdout", hint="write to a file, or remove the input yourself")


@contextlib.contextmanager
def open_input(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file and its size in bytes; None for standard input and for what is no regular file."""
    if name == STANDARD:
        yield sys.stdin.buffer, None
        return
    with open(name, "rb") as file:
        status = os.fstat(file.fileno())
        yield file, status.st_size if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def open_output(path: Path | None, *, force: bool, like: str = STANDARD) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is whole, with times and permissions of `like`; None: standard output.

    Raises: ConfigError when the file exists, or the output is a terminal, without `force`.
    """
    if path is None:
        if sys.stdout.isatty() and not force:
            raise ConfigError("bytes do not go to a terminal", hint="redirect the output, or add -f")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not force:
        raise ConfigError(f"{path} exists", hint="add -f to replace it, or -o for another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if like != STANDARD:
            shutil.copystat(like, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def shown_progress(console: Console, size: int | None, label: str) -> Iterator[Progress]:
    """A bar on a terminal, where the size is known; nothing elsewhere."""
    if size and console.err.isatty():
        with console.progress(size, label) as advance:
            yield lambda amount: advance(amount)
    else:
        yield lambda amount: None


def shipped_network() -> Path | None:
    """The network file of the package, if this version has one."""
    from luthier.entropy import codec

    path = Path(codec.__file__).parent / "model" / "network.bin"
    return path if path.is_file() else None


def open_network(name: str) -> Network | None:
    """The network to compress with: `none`, `auto` (the package's, if it has one) or a file."""
    path = {"none": None, "auto": shipped_network()}.get(name, Path(name))
    if path is None:
        return None
    from luthier.entropy.codec.integer_network import IntegerNetwork

    return IntegerNetwork.load(path)


def network_finder(name: str) -> Callable[[str], Network]:
    """Finds the network of a file by its SHA-256 in the package or the file `name`; else raises DataError."""

    def find(sha256: str) -> Network:
        for candidate in (name, "auto"):
            network = open_network(candidate)
            if network is not None and network.sha256 == sha256:
                return network
        raise DataError(
            f"the file needs the network with SHA-256 {sha256}, which is not here",
            hint="give that network's file with --model",
        )

    return find


def row(name: str, summary: Summary) -> dict[str, object]:
    """One file for --json."""
    return {
        "file": name,
        "bytes": summary.size,
        "compressed_bytes": summary.compressed,
        "bits_per_byte": summary.bits_per_byte,
        "frames": len(summary.frames),
        "frames_with_code": summary.coded,
        "model": summary.header.model,
    }


def sizes(summary: Summary) -> str:
    """The sizes in words."""
    return f"{summary.size:,} bytes, {summary.compressed:,} compressed, {summary.bits_per_byte:.4f} bits per byte"
