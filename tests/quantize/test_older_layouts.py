"""Older layouts, packed here loop by loop as their packers are described, come back as the same matrices."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.quantize.checkpoint import read_quantized, to_tensors, write_checkpoint
from luthier.quantize.inspect import inspect_checkpoint
from luthier.quantize.older_layouts import unpack_tiles
from luthier.quantize.weights import QuantizedWeight

OUT, IN, GROUP = 8, 192, 64
PREFIX = "model.layers.0.self_attn.q_proj"


def pack_tiles(codes: Tensor) -> Tensor:
    """int16 (out / 4, in): permute a row by 32 and by 8 inputs, interleave four rows by 64 inputs, pack four codes."""
    out, columns = codes.shape
    rows = codes.tolist()
    for row in rows:
        for start in range(0, columns, 32):
            chunk = row[start : start + 32]
            spread = [chunk[8 * b + 2 * a + c] for a in range(4) for b in range(4) for c in range(2)]
            row[start : start + 32] = [spread[8 * part + k] for part in range(4) for k in (0, 2, 4, 6, 1, 3, 5, 7)]
    words = []
    for tile in range(0, out, 4):
        stream = []
        for start in range(0, columns, 64):
            for row in rows[tile : tile + 4]:
                stream += row[start : start + 64]
        nibbles = [stream[i : i + 4] for i in range(0, len(stream), 4)]
        words.append([a | b << 4 | c << 8 | d << 12 for a, b, c, d in nibbles])
    return torch.tensor(words, dtype=torch.int32).to(torch.int16)


def padded_rows(grid: Tensor) -> Tensor:
    """(in / G, out) with rows of zeros up to a multiple of eight."""
    rows = -(-len(grid) // 8) * 8
    return torch.cat([grid, grid.new_zeros(rows - len(grid), grid.shape[1])])


def rotation_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    scales, pairs, theta = weight.transform()
    prefix = f"{PREFIX}.rotation"
    return {f"{prefix}.theta": theta, f"{prefix}.pairs": pairs, f"{prefix}.channel_scales": scales.view(1, -1)}


def native(weight: QuantizedWeight) -> dict[str, Tensor]:
    zeros = -weight.steps.float() * weight.points
    return {
        f"{PREFIX}.qlinear.qweight": pack_tiles(weight.codes),
        f"{PREFIX}.qlinear.scales": padded_rows(weight.steps.t()),
        f"{PREFIX}.qlinear.scaled_zeros": padded_rows(zeros.half().t()),
        **rotation_of(weight),
    }


def intermediate(weight: QuantizedWeight) -> dict[str, Tensor]:
    now = to_tensors(PREFIX, weight)
    parts = {f"{PREFIX}.qlinear.{part}": now[f"{PREFIX}.{part}"] for part in ("qweight", "qzeros", "scales")}
    return {**parts, **rotation_of(weight)}


LAYOUTS = {"native": native, "intermediate": intermediate}


@pytest.fixture
def weight(by_rounding: Callable[..., QuantizedWeight]) -> QuantizedWeight:
    weight = by_rounding(torch.randn(OUT, IN), group_size=GROUP, rounds=8)
    weight.steps[3, 1] = 6e-7  # a group of zeros: its fp16 product with the zero code is far off
    return weight


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    rest = {"model.norm.weight": torch.ones(4)}
    save_file({name: tensor.contiguous() for name, tensor in {**rest, **tensors}.items()}, path / "model.safetensors")
    settings = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": 8}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    return path


def test_tiles_of_the_native_layout() -> None:
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert pack_tiles(codes).shape == (2, 128)
    assert torch.equal(unpack_tiles(pack_tiles(codes)), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_older_layouts_are_read(weight: QuantizedWeight, layout: str, tmp_path: Path) -> None:
    read = read_quantized(folder_of(tmp_path / "old", LAYOUTS[layout](weight)))
    assert list(read) == [PREFIX]
    for field in dataclasses.fields(QuantizedWeight):
        left, right = getattr(read[PREFIX], field.name), getattr(weight, field.name)
        if field.name == "points" and layout == "native":
            left, right = left.clone(), right.clone()
            left[3, 1] = right[3, 1]
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right, field.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_older_checkpoints_can_be_written_anew(weight: QuantizedWeight, layout: str, tmp_path: Path) -> None:
    bias = {f"{PREFIX}.qlinear.bias": torch.arange(OUT).half()}
    old = folder_of(tmp_path / "old", LAYOUTS[layout](weight) | bias)
    options = {"config_extra": {}, "dtype": torch.float16, "provenance": {}}
    write_checkpoint(old, tmp_path / "new", read_quantized(old), **options)
    tensors = load_file(tmp_path / "new/model.safetensors")
    assert tensors.keys() == {*to_tensors(PREFIX, weight), "model.norm.weight", f"{PREFIX}.bias"}
    assert torch.equal(tensors[f"{PREFIX}.qweight"], to_tensors(PREFIX, weight)[f"{PREFIX}.qweight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_knows_them(weight: QuantizedWeight, layout: str, tmp_path: Path) -> None:
    found = inspect_checkpoint(folder_of(tmp_path / "old", LAYOUTS[layout](weight)))
    assert found.layout == {"native": "paper-era", "intermediate": "intermediate"}[layout]
    assert found.body.weights == OUT * IN
    assert found.body.bits("codes") == 4
    assert sum(found.zero_points) == OUT * IN // GROUP
    assert all(reader.reasons[0].startswith(found.layout) for reader in found.readers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_named(weight: QuantizedWeight, layout: str, tmp_path: Path) -> None:
    tensors = LAYOUTS[layout](weight)
    for number, name in enumerate(name for name in tensors if not name.endswith("qweight")):
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=rf"{name}: missing"):
            read_quantized(folder_of(tmp_path / f"missing{number}", fewer))[PREFIX]
        cut = {**tensors, name: tensors[name][:, :-1]}
        with pytest.raises(CheckpointError, match=r"q_proj.* got .*, expected .*"):
            read_quantized(folder_of(tmp_path / f"cut{number}", cut))[PREFIX]
        # a tensor without its last row; rows of padding may be missing
        short = {**tensors, name: tensors[name][:2]}
        if not name.endswith("channel_scales"):
            with pytest.raises(CheckpointError, match=r"q_proj.* got .*, expected .*"):
                read_quantized(folder_of(tmp_path / f"short{number}", short))[PREFIX]


def test_zeros_that_are_no_codes_are_refused(weight: QuantizedWeight, tmp_path: Path) -> None:
    tensors = native(weight)
    name = f"{PREFIX}.qlinear.scaled_zeros"
    for number, factor in enumerate((-1, 0.53)):  # the other sign; no whole numbers
        read = read_quantized(folder_of(tmp_path / str(number), {**tensors, name: tensors[name] * factor}))
        with pytest.raises(CheckpointError, match="scaled_zeros: not −scales times whole numbers from 0 to 15"):
            read[PREFIX]
