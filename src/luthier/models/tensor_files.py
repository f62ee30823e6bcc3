"""The tensors of a model folder without a model: read one by one, written shard by shard.

Neither direction holds more than one shard in memory, whatever the size of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.core.files import read_json, write_json
from luthier.models.load import check_weight_files

SHARD_BYTES = 1 << 30  # saving takes twice as much memory
NOT_COPIED = (".md", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
OWN_FILES = ("config.json", "luthier.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, in natural order, read when they are asked for."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._files = dict[str, Any]()
        for file in files:
            try:
                handle = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a complete safetensors file ({error})",
                    hint="the weights are read from safetensors files; copy or download it again",
                ) from error
            self._files.update(dict.fromkeys(handle.keys(), handle))

    @classmethod
    def of_folder(cls, folder: Path) -> TensorFiles:
        """The weights of a model folder; CheckpointError when there are none, or a file of its index is missing."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such model folder", hint="check the path")
        check_weight_files(folder)
        index = folder / "model.safetensors.index.json"
        names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
        if not index.exists() and not (folder / "model.safetensors").exists():
            raise CheckpointError(
                f"{folder}: has no model.safetensors",
                hint="only safetensors can be read; load and save the model with transformers to convert others",
            )
        return cls([folder / name for name in sorted(names)])

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files, key=natural))

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, without reading the tensor; a dtype that no model here has counts as complex."""
        entry = self._files[name].get_slice(name)
        return DTYPES.get(entry.get_dtype(), torch.complex64), tuple(entry.get_shape())


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))


class ShardWriter:
    """Writes tensors to safetensors files of at most `size` bytes in a folder, and their index. `close` ends it."""

    def __init__(self, folder: Path, size: int = SHARD_BYTES) -> None:
        self.folder, self.size = folder, size
        self.tensors, self.bytes, self.total = dict[str, Tensor](), 0, 0
        self.storages, self.files = set[int](), list[list[str]]()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor; what does not fit beside it is written before."""
        if self.tensors and self.bytes + tensor.nbytes > self.size:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in self.storages:  # a transform that several matrices share
            tensor = tensor.clone()
        self.storages.add(tensor.untyped_storage().data_ptr())
        self.tensors[name] = tensor
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def close(self) -> None:
        """Write the rest, and give the files the names by which Hugging Face tools find them."""
        self._flush()
        if len(self.files) == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        weight_map = dict[str, str]()
        for number, names in enumerate(self.files):
            final = f"model-{number + 1:05}-of-{len(self.files):05}.safetensors"
            self._file(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self.tensors, self._file(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.tensors))
        self.tensors, self.bytes, self.storages = {}, 0, set()

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"


def copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, chat template, license: whatever is neither weights, markdown nor OWN_FILES."""
    for file in sorted(source.iterdir()):
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and not file.name.endswith(NOT_COPIED) and file.name not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)
