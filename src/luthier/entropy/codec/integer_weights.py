"""The file of an integer network: its shape, its arrays, where they came from, and a digest over all of them.

A line that names the format, the SHA-256 of the rest (32 bytes), and an `.npz` archive. Its array `about` is JSON with
`shape` and `provenance`. The others, for width D, H heads of size S, F hidden numbers and a window of W:

    table.NAME          (rows, D) int8     rows that are added up (`integer_features.NAMES`)
    table.scales        (6) int32          residual units per 2^8 of a row's numbers
    code                (m L, D) int8      only with segment codes: a row for each level of each dimension
    code.scale          (1) int32          of these rows, in the units of table.scales
    LAYER.qkv           (H S + 2 S, D)     int8 weights of -63 ... 63, each with `.scale` (outputs) int32, in 2^-28
    LAYER.out           (D, H S)           LAYER is the number of a layer from 0
    LAYER.up            (F, D)
    LAYER.down          (D, F)
    LAYER.distance      (H, W) int32       score in 2^-12 bits by age in bytes
    LAYER.scores        (H) int32          in 2^-26 of 2^-12 bits
    LAYER.gains         (5) int64          before attention, of queries, keys and mixed values, before the feed-forward
    head                (256, D)           `.scale` in 2^-24 of 2^-12 bits
    head.gain           (1) int64
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_write
from luthier.entropy.codec.integer_features import NAMES

MAGIC = b"luthier integer network 1\n"  # the number is the version of all that is said here
DIGEST = 32
SYMBOLS = 256
WEIGHT_LIMIT = 63
RESIDUAL_LIMIT = (1 << 23) - 1
MAX_HEAD = 256
MAX_WINDOW = 1024  # so that mixed values stay below 2^31
MAX_CODE = {"code_dims": 8, "code_levels": 16}  # so that what the residual stream begins with stays below 2^31
MAX_INPUTS = {"width": 512, "hidden": 2048}  # so that 2^8 times a logit's sum, and every other sum, do too
GAINS = ("attention", "query", "key", "mixed", "feed")
HINT = "the file is damaged or was made by another version; get it again, or make it anew"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes from which those of all arrays follow."""

    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int
    window: int
    table_bits: tuple[int, ...]
    code_dims: int = 0
    code_levels: int = 4

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without segment codes, as if there were none, so that digests of such networks stay."""
        sizes = asdict(self)
        return sizes if self.code_dims else {name: sizes[name] for name in sizes if name not in MAX_CODE}


@dataclass(frozen=True, kw_only=True)
class IntegerWeights:
    """All that the network computes with."""

    shape: Shape
    arrays: Mapping[str, NDArray[Any]]
    provenance: Mapping[str, Any]
    """How it was made: recipe, data with hashes, measurements."""

    @property
    def sha256(self) -> str:
        """Digest of shape, arrays and provenance, in hexadecimal."""
        digest = hashlib.sha256(MAGIC)
        for part in (self.shape.to_dict(), dict(self.provenance)):
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()


def expected_arrays(shape: Shape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of every array of a network."""
    width, size, inner = shape.width, shape.head_width, shape.heads * shape.head_width
    sizes = (SYMBOLS, *(1 << bits for bits in shape.table_bits))
    arrays: dict[str, tuple[tuple[int, ...], type]] = {
        f"table.{name}": ((rows, width), np.int8) for name, rows in zip(NAMES, sizes, strict=True)
    }
    arrays["table.scales"] = ((len(NAMES),), np.int32)
    if shape.code_dims:
        arrays["code"] = ((shape.code_dims * shape.code_levels, width), np.int8)
        arrays["code.scale"] = ((1,), np.int32)
    for layer in range(shape.layers):
        matrices = {
            "qkv": (inner + 2 * size, width),
            "out": (width, inner),
            "up": (shape.hidden, width),
            "down": (width, shape.hidden),
        }
        for name, (outputs, inputs) in matrices.items():
            arrays |= _matrix(f"{layer}.{name}", outputs, inputs)
        arrays[f"{layer}.distance"] = ((shape.heads, shape.window), np.int32)
        arrays[f"{layer}.scores"] = ((shape.heads,), np.int32)
        arrays[f"{layer}.gains"] = ((len(GAINS),), np.int64)
    return arrays | _matrix("head", SYMBOLS, width) | {"head.gain": ((1,), np.int64)}


def _matrix(name: str, outputs: int, inputs: int) -> dict[str, tuple[tuple[int, ...], type]]:
    return {name: ((outputs, inputs), np.int8), f"{name}.scale": ((outputs,), np.int32)}


def check(weights: IntegerWeights, source: str) -> None:
    """CheckpointError unless every array has its shape, type and range, so that no sum can overflow."""
    shape = weights.shape
    divisible = all(size > 0 and size % 16 == 0 for size in (shape.width, shape.head_width, shape.hidden, shape.window))
    small = 0 < shape.layers <= 64 and shape.heads > 0 and shape.heads * shape.head_width <= MAX_INPUTS["width"]
    small = small and all(getattr(shape, name) <= most for name, most in MAX_INPUTS.items())
    small = small and shape.head_width <= MAX_HEAD and shape.window <= MAX_WINDOW
    small = small and all(getattr(shape, name) <= most for name, most in MAX_CODE.items())
    small = small and shape.code_dims >= 0 and shape.code_levels >= 2
    if not (divisible and small and len(shape.table_bits) == len(NAMES) - 1):
        raise CheckpointError(f"{source}: got the shape {shape}, which no integer network has", hint=HINT)
    wanted = expected_arrays(shape)
    if set(wanted) != set(weights.arrays):
        odd = sorted(set(wanted) ^ set(weights.arrays))[:3]
        raise CheckpointError(f"{source}: arrays {odd} are missing or unknown", hint=HINT)
    for name, (size, kind) in wanted.items():
        array = weights.arrays[name]
        if array.shape != size or array.dtype != kind:
            raise CheckpointError(
                f"{source}: {name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} {size}", hint=HINT
            )
        if not _in_range(name, array):
            raise CheckpointError(f"{source}: {name} has numbers out of range", hint=HINT)


def _in_range(name: str, array: NDArray[Any]) -> bool:
    """Whether the numbers of an array keep all that follows from them inside 32 bits."""
    low, high = int(array.min()), int(array.max())
    if name in ("table.scales", "code.scale"):
        return low >= 0 and high < 1 << 20
    if name.endswith((".scale", ".scores")):
        return low >= 0
    if name.endswith(".distance"):
        return low > -(1 << 26) and high < 1 << 26
    if name.endswith((".gains", ".gain")):
        return low > 0 and high < 1 << 52
    return name == "code" or name.startswith("table.") or (low >= -WEIGHT_LIMIT and high <= WEIGHT_LIMIT)


def save(weights: IntegerWeights, path: Path) -> None:
    """Write the file; CheckpointError if the arrays are not a network's."""
    check(weights, str(path))
    about = json.dumps({"shape": weights.shape.to_dict(), "provenance": dict(weights.provenance)}, sort_keys=True)
    stream = io.BytesIO()
    entries: dict[str, Any] = {"about": np.frombuffer(about.encode(), np.uint8), **weights.arrays}
    np.savez_compressed(stream, **entries)
    payload = stream.getvalue()
    atomic_write(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def load(path: Path) -> IntegerWeights:
    """Read a file whole; CheckpointError when it is missing, damaged, of another version or no network."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check the path") from error
    if not content.startswith(MAGIC):
        start = content[: len(MAGIC)]
        raise CheckpointError(f"{path}: starts with {start!r}, an integer network with {MAGIC!r}", hint=HINT)
    digest, payload = content[len(MAGIC) : len(MAGIC) + DIGEST], content[len(MAGIC) + DIGEST :]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: its contents do not have the digest that it names", hint=HINT)
    weights = _parse(payload, str(path))
    check(weights, str(path))
    return weights


def _parse(payload: bytes, source: str) -> IntegerWeights:
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(arrays.pop("about").tobytes())
        shape = Shape(**{**about["shape"], "table_bits": tuple(about["shape"]["table_bits"])})
        return IntegerWeights(shape=shape, arrays=arrays, provenance=about["provenance"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: holds no integer network ({reason})", hint=HINT) from error
