"""transformers loads, runs and saves quantized folders; what is damaged is named before anything runs."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from luthier.core.errors import CheckpointError
from luthier.models.load import load_pretrained
from luthier.quantize.checkpoint import write_checkpoint
from luthier.quantize.experts import RotatedExperts
from luthier.quantize.hook import ParoQuantConfig
from luthier.quantize.linear import RotatedLinear
from luthier.quantize.weights import QuantizedWeight

KINDS = ("llama", "qwen3", "qwen3-moe", "instella", "olmo2")
TOKENS = torch.arange(24).view(2, 12)
Quantize = Callable[..., dict[str, QuantizedWeight]]
Exports = Callable[[str], tuple[Path, Path]]


def export(source: Path, out: Path, quantized: dict[str, QuantizedWeight], **options: Any) -> Path:
    settings: dict[str, Any] = {"config_extra": {}, "dtype": torch.float32, "provenance": {}}
    write_checkpoint(source, out, quantized, **{**settings, **options})
    return out


@pytest.fixture(scope="module")
def exports(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path], model_by_rounding: Quantize
) -> Exports:
    """`exports("qwen3")`: a quantized folder and its pseudo twin; do not write into them."""
    made = dict[str, tuple[Path, Path]]()

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            source, folder = tiny_folder(kind), tmp_path_factory.mktemp("exports")
            quantized = model_by_rounding(AutoModelForCausalLM.from_pretrained(source))
            made[kind] = (
                export(source, folder / "real", quantized),
                export(source, folder / "pseudo", quantized, pseudo=True),
            )
        return made[kind]

    return make


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantized_weights(exports: Exports, kind: str) -> None:
    real, pseudo = exports(kind)
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    quantized = [module for module in model.modules() if isinstance(module, RotatedLinear | RotatedExperts)]
    assert len(quantized) == (12 if kind == "qwen3-moe" else 14)
    expected = logits(AutoModelForCausalLM.from_pretrained(pseudo, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_every_dtype_keeps_the_stored_tensors(exports: Exports, kind: str, dtype: torch.dtype) -> None:
    real, pseudo = exports(kind)
    model = load_pretrained(real, dtype=dtype)
    assert model.dtype == dtype
    assert model.model.embed_tokens.weight.dtype == dtype
    state, stored = model.state_dict(), load_file(real / "model.safetensors")
    quantized = [name for name in stored if stored[name].dtype != torch.float32]
    assert any(name.endswith("theta") for name in quantized)
    for name in quantized:
        assert state[name].dtype == stored[name].dtype, name
        assert torch.equal(state[name], stored[name]), name
    expected = logits(AutoModelForCausalLM.from_pretrained(pseudo, dtype=torch.float32))
    error = (logits(model) - expected).norm() / expected.norm()
    assert error < {torch.float16: 0.01, torch.bfloat16: 0.06, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_saving_writes_the_same_tensors(exports: Exports, kind: str, tmp_path: Path) -> None:
    real, _ = exports(kind)
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    before, after = load_file(real / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (real, tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = load_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("bits", "rounds"), [(2, 1), (3, 4), (8, 0)])
def test_our_extensions(model_by_rounding: Quantize, tmp_path: Path, bits: int, rounds: int) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 60, "intermediate_size": 101, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=3, num_key_value_heads=3, mlp_bias=True)
    source = AutoModelForCausalLM.from_config(config)
    source.save_pretrained(tmp_path / "source")
    quantized = model_by_rounding(source, bits=bits, rounds=rounds)
    real = export(tmp_path / "source", tmp_path / "real", quantized)
    pseudo = export(tmp_path / "source", tmp_path / "pseudo", quantized, pseudo=True)
    expected = logits(load_pretrained(pseudo))
    torch.testing.assert_close(logits(load_pretrained(real)), expected, rtol=1e-4, atol=1e-5)


def test_the_base_model_loads_too(exports: Exports) -> None:
    real, pseudo = exports("qwen3")
    with torch.no_grad():
        states = [AutoModel.from_pretrained(folder)(TOKENS).last_hidden_state for folder in (real, pseudo)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


def test_it_says_once_which_kernels_run(exports: Exports, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="luthier"):
        AutoModelForCausalLM.from_pretrained(exports("llama")[0])
    assert len([record for record in caplog.records if record.name == "luthier"]) == 1


@pytest.mark.parametrize(
    "lines",
    [
        ("import luthier, sys; assert 'torch' not in sys.modules", "from transformers import AutoModelForCausalLM"),
        ("from transformers import AutoModelForCausalLM", "import luthier"),
    ],
    ids=["luthier first", "transformers first"],
)
def test_either_import_order(exports: Exports, lines: tuple[str, str]) -> None:
    load = f"AutoModelForCausalLM.from_pretrained({str(exports('qwen3')[0])!r})"
    code = "\n".join([*lines, f"print(type({load}.model.layers[0].mlp.up_proj).__name__)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.strip() == "RotatedLinear", done.stderr


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def change(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.clone().index_fill_(-1, torch.tensor([1]), value)


UP = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no theta": ("llama", without(f"{UP}.theta"), rf"{UP}.theta: missing, expected float16 \(4, 32\)"),
    "no zeros": ("llama", without(f"{UP}.qzeros"), f"{UP}.qzeros: missing"),
    "short codes": ("llama", change(f"{UP}.qweight", lambda t: t[:, :-1]), f"{UP}.qweight: got int32 .*, expected"),
    "few rounds": ("llama", change(f"{UP}.theta", lambda t: t[:3]), rf"{UP}.theta: got float16 \(3, 32\)"),
    "wide pairs": ("llama", change(f"{UP}.pairs", lambda t: t.int()), f"{UP}.pairs: got int32"),
    "twice a channel": ("llama", change(f"{UP}.pairs", spoil(0)), f"{UP}: pairs: .* no permutation"),
    "nan": ("llama", change(f"{UP}.theta", spoil(float("nan"))), f"{UP}: theta has values that are NaN"),
    "infinite": ("llama", change(f"{UP}.scales", spoil(float("inf"))), f"{UP}.scales has values that are NaN or inf"),
    "expert": ("qwen3-moe", without(f"{EXPERTS}.2.up_proj.scales"), f"{EXPERTS}.2.up_proj.scales: missing"),
    "no expert": ("qwen3-moe", without(f"{EXPERTS}.3.up_proj.qweight"), f"{EXPERTS}.3.up_proj.qweight: missing"),
    "half": (
        "qwen3-moe",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(EXPERTS) and "down" in name],
        f"{EXPERTS}.0.down_proj.qweight: missing",
    ),
    "no transform": (
        "qwen3-moe",
        without(f"{EXPERTS}.gate_up_weight_theta"),
        f"{EXPERTS}.gate_up_weight_theta: missing",
    ),
    "transform": (
        "qwen3-moe",
        change(f"{EXPERTS}.down_weight_pairs", spoil(0)),
        f"{EXPERTS}.down_proj: pairs: .* no permutation",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(exports: Exports, damage: str, tmp_path: Path) -> None:
    kind, function, message = DAMAGE[damage]
    shutil.copytree(exports(kind)[0], tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged/model.safetensors")
    function(tensors)
    save_file(tensors, tmp_path / "damaged/model.safetensors", {"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, load_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "qweight: got int32"),
        ({"group_size": 64}, "qzeros: got int32|scales: got"),
        ({"krot": 8}, r"theta: got float16 \(4, 64\), expected float16 \(8, 64\)"),
        ({"bits": 5}, "bits is 5, which no checkpoint has"),
        ({"krot": -1}, "krot is -1"),
        ({"group_size": "big"}, "group_size is 'big'"),
    ],
)
def test_settings_of_other_weights(exports: Exports, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    shutil.copytree(exports("llama")[0], tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged/config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "damaged/config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM.from_pretrained, load_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "damaged")


def test_a_config_without_quantized_weights(exports: Exports, tmp_path: Path) -> None:
    real, pseudo = exports("llama")
    shutil.copytree(pseudo, tmp_path / "damaged")
    shutil.copy(real / "config.json", tmp_path / "damaged/config.json")
    with pytest.raises(CheckpointError, match="says paroquant, but no tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


def test_loading_does_not_quantize(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=ParoQuantConfig())


def test_older_layouts_say_how_to_convert(exports: Exports, tmp_path: Path) -> None:
    shutil.copytree(exports("llama")[0], tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    renamed = {
        name.replace(".qweight", ".qlinear.qweight").replace(".theta", ".rotation.theta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "old/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layout of an older version") as caught:
        load_pretrained(tmp_path / "old")
    assert "write_checkpoint" in caught.value.hint
