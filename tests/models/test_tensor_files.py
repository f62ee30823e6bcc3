from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import CheckpointError
from luthier.models.tensor_files import ShardWriter, TensorFiles, copy_other_files, natural


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["layers.0.w", "layers.2.w", "layers.10.w"]
    return {name: torch.randn(4, 8, generator=generator) for name in names}


def write(folder: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, size)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


@pytest.mark.parametrize(("size", "files"), [(1000, 1), (256, 2), (100, 3)])
def test_what_is_written_is_read_whatever_the_shards(
    tensors: dict[str, torch.Tensor], tmp_path: Path, size: int, files: int
) -> None:
    write(tmp_path / "model", tensors, size)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == files
    found = TensorFiles.of_folder(tmp_path / "model")
    assert list(found) == ["layers.0.w", "layers.2.w", "layers.10.w"]  # not 0, 10, 2
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found.header("layers.2.w") == (torch.float32, (4, 8))


def test_the_index_names_the_file_of_every_tensor(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write(tmp_path / "model", tensors, 100)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 3 * 4 * 8 * 4}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "model" / file)


def test_tensors_that_share_their_storage_are_written_both(tmp_path: Path) -> None:
    both = torch.arange(8.0)
    write(tmp_path / "model", {"a": both, "b": both}, 1000)
    assert torch.equal(TensorFiles.of_folder(tmp_path / "model")["b"], both)


def test_a_folder_without_weights_or_with_broken_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        TensorFiles.of_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        TensorFiles.of_folder(tmp_path)
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        TensorFiles.of_folder(tmp_path)


def test_everything_but_weights_and_own_files_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "luthier.json", "README.md", "x.safetensors"):
        (source / name).write_text("{}")
    copy_other_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "tokenizer.json"]


def test_numbers_in_names_sort_as_numbers() -> None:
    assert sorted(["a.10.w", "a.9.w", "a.b"], key=natural) == ["a.b", "a.9.w", "a.10.w"]
