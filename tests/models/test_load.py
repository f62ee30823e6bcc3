"""Model folders: exact round trips, strict loading that names the culprit, atomic saving with provenance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.core.errors import CheckpointError
from luthier.core.files import sha256_file
from luthier.models.arithmetic import SIZES, tensor_shapes
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.models.load import load_pretrained, read_provenance, save_pretrained

CONFIG = InstellaConfig(vocab_size=83, **SIZES["nano"])


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Random weights in the released layout, written without the model class: names, bfloat16, old config.json."""
    folder = tmp_path / "released"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).mul(0.1).to(torch.bfloat16)
        for name, shape in tensor_shapes(CONFIG.dimensions).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = SIZES["nano"] | {
        "architectures": ["InstellaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_instella.InstellaForCausalLM"},
        "model_type": "instella",
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 3_691_950.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.0",
        "vocab_size": 83,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", bos_token="<end>")


def test_released_layout_loads_and_exports_the_same_bytes(released: Path, tmp_path: Path) -> None:
    model = load_pretrained(released)
    assert isinstance(model, InstellaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.training
    save_pretrained(model, None, tmp_path / "exported", {"verb": "test"})
    assert sha256_file(tmp_path / "exported/model.safetensors") == sha256_file(released / "model.safetensors")
    tokens = torch.arange(20)[None]
    assert torch.equal(load_pretrained(tmp_path / "exported")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frequencies_are_exact_after_loading_through_the_meta_device(released: Path, dtype: torch.dtype) -> None:
    exact = 3_691_950.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    ours = load_pretrained(released, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(released, dtype=dtype, low_cpu_mem_usage=True)
    for model in (ours, theirs):
        assert model.dtype == dtype
        frequencies = model.model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        torch.testing.assert_close(frequencies.double(), exact, rtol=1e-6, atol=0)


def test_loaded_logits_equal_a_model_filled_by_hand(released: Path) -> None:
    config = InstellaConfig.from_pretrained(released)
    model = InstellaForCausalLM(config).to(torch.bfloat16).eval()
    model.load_state_dict(load_file(released / "model.safetensors"))
    tokens = torch.arange(20)[None]
    assert torch.equal(load_pretrained(released)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.norm.weight": None}, "1 missing: model.norm.weight"),
        ({"model.layers.0.extra.weight": (3,)}, "1 unexpected: model.layers.0.extra.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": (5, 5)},
            r"1 mis-shaped: model.layers.1.mlp.up_proj.weight \(file \(5, 5\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    released: Path, change: dict[str, tuple[int, ...] | None], named: str
) -> None:
    weights = load_file(released / "model.safetensors")
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.zeros(shape)
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=named):
        load_pretrained(released)


def test_a_truncated_file_is_named_with_a_hint(released: Path) -> None:
    file = released / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a complete safetensors file") as caught:
        load_pretrained(released)
    assert "download it again" in caught.value.hint


def test_a_missing_shard_is_named(released: Path) -> None:
    (released / "model.safetensors").rename(released / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (released / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors"):
        load_pretrained(released)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_pretrained("./absent")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "two"}')
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*'num_hidden_layers' expected int"):
        load_pretrained(tmp_path)


def test_another_architecture_loads_and_saves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    save_pretrained(LlamaForCausalLM(config), tokenizer, tmp_path / "llama", {})
    model = load_pretrained(str(tmp_path / "llama"), attention="eager")
    assert isinstance(model, LlamaForCausalLM)
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id, "generation knows where to stop"


def test_a_saved_folder_is_whole_and_replaces_the_old_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, folder = InstellaForCausalLM(CONFIG), tmp_path / "model"
    folder.mkdir()
    (folder / "stale.safetensors").write_bytes(b"old")
    save_pretrained(model, tokenizer, folder, {"verb": "pretrain", "seed": 7})
    assert not (folder / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing temporary is left"
    assert read_provenance(folder) == {
        "verb": "pretrain",
        "seed": 7,
        "weights": {"model.safetensors": sha256_file(folder / "model.safetensors")},
    }
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    loaded = load_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_a_failed_save_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(InstellaForCausalLM(CONFIG), None, folder, {"seed": 1})
    with pytest.raises(TypeError):
        save_pretrained(InstellaForCausalLM(CONFIG), None, folder, {"seed": object()})
    assert read_provenance(folder)["seed"] == 1
    load_pretrained(folder)


def test_given_tensors_replace_the_models_own(tmp_path: Path) -> None:
    model = InstellaForCausalLM(CONFIG)
    gathered = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_pretrained(model, None, tmp_path / "model", {}, state_dict=gathered)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(stored[name], weight) for name, weight in gathered.items())


def test_a_folder_moved_aside_by_a_crash_is_found_again(released: Path) -> None:
    shutil.move(released, released.with_name(f".{released.name}.old.partial"))
    assert isinstance(load_pretrained(released), InstellaForCausalLM)


def test_provenance_of_a_foreign_folder_is_empty(released: Path) -> None:
    assert read_provenance(released) == {}
