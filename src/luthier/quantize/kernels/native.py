"""The rotation of a few rows on a CPU, in C: compiled by the machine's own compiler at first use, and kept.

Decoding rotates one row for every matrix, where the calls of K rounds of tensor operations would cost more than the
arithmetic, and dense matrices more bytes than the weights. Where there is no compiler, the caller uses the dense form.
`LUTHIER_NATIVE=0` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.quantize.weights import QuantizedWeight

SOURCE = Path(__file__).with_name("rotate.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
NAMES = {torch.bfloat16: "rotate_bf16", torch.float32: "rotate_fp32"}
MAX_GROUP = 256


class Native(NamedTuple):
    """The compiled functions by dtype, none where they cannot be had, and why."""

    functions: dict[torch.dtype, Callable[..., None]]
    reason: str


@dataclass(frozen=True)
class Tables:
    """One transform in the order in which the C code reads it."""

    scales: Tensor
    pairs: Tensor
    cosines: Tensor
    sines: Tensor
    shape: tuple[int, int, int]  # groups, group size, rounds

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where the tables lie; asking torch for each of them would take longer than rotating a row."""
        return self.scales.data_ptr(), self.pairs.data_ptr(), self.cosines.data_ptr(), self.sines.data_ptr()

    @staticmethod
    def of(weight: QuantizedWeight) -> Tables:
        """Tables of a matrix's transform, on the CPU."""
        groups, size, rounds = len(weight.channel_scales) // weight.group_size, weight.group_size, weight.rounds
        pairs = weight.pairs.cpu().view(rounds, groups, size).transpose(0, 1)
        theta = weight.theta.cpu().float().view(rounds, groups, size // 2).transpose(0, 1)
        return Tables(
            weight.channel_scales.cpu().float().contiguous(),
            pairs.to(torch.uint8).contiguous(),
            theta.cos().contiguous(),
            theta.sin().contiguous(),
            (groups, size, rounds),
        )


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Scale and rotate x (rows, in), contiguous, bf16 or fp32, on the CPU; computed in fp32."""
    out = torch.empty_like(x)
    load().functions[x.dtype](x.data_ptr(), out.data_ptr(), *tables.addresses, x.shape[0], *tables.shape)
    return out


@functools.cache
def load() -> Native:
    """Compile once per machine and version of the source, or say why not."""
    if os.environ.get("LUTHIER_NATIVE", "1") == "0":
        return Native({}, "turned off by LUTHIER_NATIVE=0")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Native({}, "no C compiler found")
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return Native({}, f"the C compiler failed ({' '.join(str(error).split())[:120]})")
    functions: dict[torch.dtype, Any] = {}
    for dtype, name in NAMES.items():
        functions[dtype] = getattr(library, name)
        functions[dtype].argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4
        functions[dtype].restype = None
    return Native(functions, f"compiled by {Path(compiler).name}")


def _compiled(compiler: str) -> Path:
    """The shared library in the user's cache, named after all that it depends on."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _processor())).encode()).hexdigest()[:16]
    target = cache / f"rotate-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "rotate.so"
            command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
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
