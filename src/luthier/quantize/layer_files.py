"""The result of one layer as one file: whole or absent, and only good for the settings that made it.

    layers/00003.safetensors    tensors {matrix}.{codes, points, steps, theta, pairs, channel_scales}
                                metadata: identity of settings, text and weights; what each matrix is; its losses

Matrices are named within the layer ("self_attn.q_proj"); their tensors are those of `QuantizedWeight`, unpacked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_write
from luthier.quantize.weights import QuantizedWeight

TENSORS = ("codes", "points", "steps", "theta", "pairs", "channel_scales")
NUMBERS = ("bits", "group_size", "in_features")


@dataclass(frozen=True)
class StoredLayer:
    """A finished layer: its matrices by name within the layer, the identity of what made them, its row of metrics."""

    weights: Mapping[str, QuantizedWeight]
    identity: str
    row: Mapping[str, Any]


def layer_path(folder: Path, index: int) -> Path:
    """The file of a layer."""
    return folder / f"{index:05d}.safetensors"


def save_layer(path: Path, layer: StoredLayer) -> None:
    """Write a layer's file atomically, with a checksum of its tensors."""
    tensors = {
        f"{name}.{part}": getattr(weight, part).cpu().contiguous().clone()
        for name, weight in layer.weights.items()
        for part in TENSORS
    }
    metadata = {
        "identity": layer.identity,
        "matrices": json.dumps({n: {k: getattr(w, k) for k in NUMBERS} for n, w in layer.weights.items()}),
        "row": json.dumps(dict(layer.row)),
        "sha256": _checksum(tensors),
    }
    atomic_write(path, save(tensors, metadata))


def read_layer(path: Path) -> StoredLayer:
    """Read a layer's file; CheckpointError when it is missing, truncated or damaged."""
    metadata = read_metadata(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksum(tensors) != metadata["sha256"]:
            raise _damaged(path, "its checksum does not fit")
        weights = {name: _weight(tensors, name, numbers) for name, numbers in metadata["matrices"].items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, error) from error
    return StoredLayer(weights, metadata["identity"], metadata["row"])


def read_metadata(path: Path) -> dict[str, Any]:
    """What a layer's file says of itself: identity, matrices, row, sha256. CheckpointError as `read_layer`."""
    try:
        with safe_open(path, "pt") as file:
            found = dict(file.metadata() or {})
        return {
            "identity": found["identity"],
            "sha256": found["sha256"],
            "matrices": json.loads(found["matrices"]),
            "row": json.loads(found["row"]),
        }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


class LayerFiles(Mapping[str, QuantizedWeight]):
    """All matrices of finished layers under their full names (model.layers.3.mlp.down_proj), read when asked for.

    prefixes: the module path of each layer, by index. CheckpointError when a layer's file is missing or damaged.
    """

    def __init__(self, folder: Path, prefixes: Sequence[str]) -> None:
        self._places = dict[str, tuple[Path, str, dict[str, int]]]()
        for index, prefix in enumerate(prefixes):
            path = layer_path(folder, index)
            for name, numbers in read_metadata(path)["matrices"].items():
                self._places[f"{prefix}.{name}"] = (path, name, numbers)

    def __getitem__(self, name: str) -> QuantizedWeight:
        path, inner, numbers = self._places[name]
        try:
            with safe_open(path, "pt") as file:
                return _weight({f"{inner}.{p}": file.get_tensor(f"{inner}.{p}") for p in TENSORS}, inner, numbers)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _weight(tensors: Mapping[str, Tensor], name: str, numbers: Mapping[str, int]) -> QuantizedWeight:
    values: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in TENSORS}
    return QuantizedWeight(**values | {number: numbers[number] for number in NUMBERS})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\n{tensors[name].dtype}\n{tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().numpy().data if tensors[name].numel() else b"")
    return digest.hexdigest()


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a whole layer ({reason})", hint="run `luthier quantize` again: it makes the layer anew"
    )
