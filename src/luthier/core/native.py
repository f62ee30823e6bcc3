"""C code of the package: compiled by the machine's own compiler at first use, and kept in the user's cache.

The caller keeps a slower form in Python for machines without a compiler. `LUTHIER_NATIVE=0` turns compiling off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


class Library(NamedTuple):
    """A compiled library, or None where it cannot be had, and why."""

    code: ctypes.CDLL | None
    reason: str


def load_library(source: Path, flags: Sequence[str] = FLAGS) -> Library:
    """The library of one C file, compiled once per machine and version of the source, or the reason why not."""
    if os.environ.get("LUTHIER_NATIVE", "1") == "0":
        return Library(None, "turned off by LUTHIER_NATIVE=0")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Library(None, "no C compiler found")
    try:
        library = ctypes.CDLL(str(_compiled(source, compiler, tuple(flags))))
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"the C compiler failed ({' '.join(str(error).split())[:120]})")
    return Library(library, f"compiled by {Path(compiler).name}")


def _compiled(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library in the user's cache, named after all that it depends on."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    key = hashlib.sha256(source.read_bytes() + repr((compiler, flags, _processor())).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *flags, "-o", str(built), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            built.replace(target)
    return target


def _processor() -> str:
    """What `-march=native` means here; homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
