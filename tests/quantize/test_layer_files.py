"""A layer's file brings back exactly what was saved, or says that it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.core.errors import CheckpointError
from luthier.quantize.layer_files import LayerFiles, StoredLayer, layer_path, read_layer, read_metadata, save_layer
from luthier.quantize.weights import QuantizedWeight


def equal(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    tensors = all(
        torch.equal(value, getattr(b, name)) if isinstance(value, torch.Tensor) else value == getattr(b, name)
        for name, value in vars(a).items()
    )
    return tensors and a.codes.dtype == b.codes.dtype


@pytest.fixture
def stored(by_rounding: Callable[..., QuantizedWeight]) -> StoredLayer:
    draw = torch.Generator().manual_seed(0)
    q = by_rounding(torch.randn(24, 40, generator=draw))
    shared = QuantizedWeight(**{**vars(q), "codes": q.codes[8:], "points": q.points[8:], "steps": q.steps[8:]})
    none = by_rounding(torch.randn(8, 64, generator=draw), rounds=0)
    weights = {"self_attn.q_proj": q, "self_attn.k_proj": shared, "mlp.experts.down_proj": none}
    return StoredLayer(weights, "settings:weights", {"layer": 0, "loss": 0.1 + 0.2, "best": None})


def test_what_is_saved_comes_back(stored: StoredLayer, tmp_path: Path) -> None:
    path = layer_path(tmp_path / "layers", 3)
    assert path.name == "00003.safetensors"
    save_layer(path, stored)
    found = read_layer(path)
    assert (found.identity, found.row) == (stored.identity, stored.row)
    assert found.weights.keys() == stored.weights.keys()
    assert all(equal(found.weights[name], weight) for name, weight in stored.weights.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_layer_is_the_same_file(stored: StoredLayer, tmp_path: Path) -> None:
    save_layer(tmp_path / "a", stored)
    save_layer(tmp_path / "b", read_layer(tmp_path / "a"))
    assert read_metadata(tmp_path / "a") == read_metadata(tmp_path / "b")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damage_is_told(damage: str, stored: StoredLayer, tmp_path: Path) -> None:
    path = tmp_path / "layer"
    save_layer(path, stored)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-10], "flip": bytes(data), "empty": b"", "text": b"not this" * 20}[damage])
    with pytest.raises(CheckpointError, match="not a whole layer"):
        read_layer(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    stored: StoredLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer"
    save_layer(path, stored)

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_layer(path, StoredLayer({}, "other", {}))
    assert read_layer(path).identity == stored.identity
    assert [p.name for p in tmp_path.iterdir()] == ["layer"]


def test_all_layers_as_one_mapping(stored: StoredLayer, tmp_path: Path) -> None:
    other = StoredLayer({"mlp.up_proj": stored.weights["self_attn.q_proj"]}, "x", {})
    for index, layer in enumerate([stored, other]):
        save_layer(layer_path(tmp_path, index), layer)
    found = LayerFiles(tmp_path, ["model.layers.0", "model.layers.1"])
    assert len(found) == 4
    assert list(found)[-1] == "model.layers.1.mlp.up_proj"
    assert equal(found["model.layers.0.self_attn.k_proj"], stored.weights["self_attn.k_proj"])
    assert equal(found["model.layers.1.mlp.up_proj"], stored.weights["self_attn.q_proj"])
    with pytest.raises(KeyError):
        found["model.layers.2.mlp.up_proj"]
    with pytest.raises(CheckpointError, match="00002"):
        LayerFiles(tmp_path, ["a", "b", "c"])
