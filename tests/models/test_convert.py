"""The original trainer's checkpoints: both directions on random weights, the order of up and gate, strictness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import CheckpointError
from luthier.models.arithmetic import SIZES, tensor_shapes
from luthier.models.convert import convert_to_hf, convert_to_trainer, hf_to_trainer, plan_shards, trainer_to_hf
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, read_provenance

D, F, L, V = 128, 352, 4, 71
CONFIG = InstellaConfig(vocab_size=V, **SIZES["nano"])


@pytest.fixture
def fused() -> dict[str, Tensor]:
    """A trainer checkpoint, written from the description of its layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (V, D),
        "ln_f.weight": (D,),
        "ff_out.weight": (V, D),
    }
    for layer in range(L):
        shapes |= {
            f"blocks.{layer}.attn_norm.weight": (D,),
            f"blocks.{layer}.att_proj.weight": (3 * D, D),
            f"blocks.{layer}.q_norm.weight": (D,),
            f"blocks.{layer}.k_norm.weight": (D,),
            f"blocks.{layer}.attn_out.weight": (D, D),
            f"blocks.{layer}.ff_norm.weight": (D,),
            f"blocks.{layer}.ff_proj.weight": (2 * F, D),
            f"blocks.{layer}.ff_out.weight": (D, F),
        }
    generator = torch.Generator().manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_rows_go_to_the_right_matrices(fused: dict[str, Tensor]) -> None:
    weights = trainer_to_hf(fused, CONFIG.dimensions)
    stacked, mlp = fused["transformer.blocks.2.att_proj.weight"], fused["transformer.blocks.2.ff_proj.weight"]
    block = "model.layers.2."
    assert torch.equal(weights[block + "self_attn.q_proj.weight"], stacked[:D])
    assert torch.equal(weights[block + "self_attn.k_proj.weight"], stacked[D : 2 * D])
    assert torch.equal(weights[block + "self_attn.v_proj.weight"], stacked[2 * D :])
    assert torch.equal(weights[block + "mlp.up_proj.weight"], mlp[:F])
    assert torch.equal(weights[block + "mlp.gate_proj.weight"], mlp[F:])
    assert torch.equal(weights[block + "mlp.down_proj.weight"], fused["transformer.blocks.2.ff_out.weight"])
    assert torch.equal(weights["lm_head.weight"], fused["transformer.ff_out.weight"])
    assert torch.equal(weights["model.norm.weight"], fused["transformer.ln_f.weight"])


def test_there_and_back(fused: dict[str, Tensor]) -> None:
    again = hf_to_trainer(trainer_to_hf(fused, CONFIG.dimensions), CONFIG.dimensions)
    assert again.keys() == fused.keys()
    assert all(torch.equal(again[name], weight) for name, weight in fused.items())


def test_grouped_key_value_heads_split_by_their_width() -> None:
    config = InstellaConfig(vocab_size=V, num_key_value_heads=2, **SIZES["nano"])
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config.dimensions).items()
    }
    stacked = hf_to_trainer(weights, config.dimensions)
    assert stacked["transformer.blocks.0.att_proj.weight"].shape == (128 + 64 + 64, 128)
    again = trainer_to_hf(stacked, config.dimensions)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("shard_bytes", [10**9, 10**6])
def test_files_there_and_back(fused: dict[str, Tensor], tmp_path: Path, suffix: str, shard_bytes: int) -> None:
    source = tmp_path / f"step1000{suffix}"
    save_file(fused, source) if suffix == ".safetensors" else torch.save(fused, source)
    convert_to_hf(source, tmp_path / "hf", CONFIG, shard_bytes=shard_bytes)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 10**6)
    assert all(file.stat().st_size < 1.2 * shard_bytes for file in files)

    loaded = load_pretrained(tmp_path / "hf").state_dict()
    expected = trainer_to_hf(fused, CONFIG.dimensions)
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    assert source.name in read_provenance(tmp_path / "hf")["parents"]

    convert_to_trainer(tmp_path / "hf", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == fused.keys()
    assert all(torch.equal(back[name], weight) for name, weight in fused.items())


def test_conversion_casts_on_request(fused: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(fused, tmp_path / "model.safetensors")
    convert_to_hf(tmp_path / "model.safetensors", tmp_path / "hf", CONFIG, dtype=torch.bfloat16)
    model = load_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    expected = fused["transformer.blocks.0.attn_out.weight"].to(torch.bfloat16)
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.o_proj.weight"], expected)


def test_what_does_not_fit_is_named(fused: dict[str, Tensor]) -> None:
    weights = trainer_to_hf(fused, CONFIG.dimensions)
    with pytest.raises(CheckpointError, match=r"missing: transformer.blocks.0"):
        trainer_to_hf(weights, CONFIG.dimensions)
    with pytest.raises(CheckpointError, match=r"unexpected: transformer.blocks.0"):
        hf_to_trainer(fused, CONFIG.dimensions)
    with pytest.raises(CheckpointError, match=r"ff_proj.weight has shape \(352, 128\).*needs \(704, 128\)"):
        trainer_to_hf({**fused, "transformer.blocks.1.ff_proj.weight": torch.zeros(F, D)}, CONFIG.dimensions)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape"):
        hf_to_trainer({**weights, "model.norm.weight": torch.zeros(3)}, CONFIG.dimensions)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_damaged_or_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        convert_to_hf(source, tmp_path / "hf", CONFIG)
    source.write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        convert_to_hf(source, tmp_path / "hf", CONFIG)
    assert not (tmp_path / "hf").exists()


def test_a_file_without_named_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        convert_to_hf(tmp_path / "model.pt", tmp_path / "hf", CONFIG)


def test_shards_keep_order_and_limit() -> None:
    assert plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, limit=8) == [["a", "b"], ["c"], ["d"]]
