"""Quantized folders: what is written is read again, bit for bit, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.core.errors import CheckpointError
from luthier.quantize.checkpoint import from_tensors, read_quantized, to_tensors, write_checkpoint
from luthier.quantize.weights import QuantizedWeight

KINDS = ("llama", "qwen3", "qwen3-moe", "instella", "olmo2")
ByRounding = Callable[..., QuantizedWeight]
Written = Callable[..., tuple[Path, dict[str, QuantizedWeight]]]


def write(source: Path, out: Path, quantized: Mapping[str, QuantizedWeight], **options: Any) -> Path:
    defaults: dict[str, Any] = {"config_extra": {}, "dtype": torch.float16, "provenance": {"verb": "quantize"}}
    write_checkpoint(source, out, quantized, **{**defaults, **options})
    return out


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    for field in dataclasses.fields(QuantizedWeight):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Callable[[str], Path],
    model_by_rounding: Callable[..., dict[str, QuantizedWeight]],
) -> Written:
    """`written("qwen3")`: the folder of a quantized model, and its matrices; do not write into it."""
    made = dict[str, tuple[Path, dict[str, QuantizedWeight]]]()

    def make(kind: str) -> tuple[Path, dict[str, QuantizedWeight]]:
        if kind not in made:
            source = tiny_folder(kind)
            quantized = model_by_rounding(AutoModelForCausalLM.from_pretrained(source))
            made[kind] = write(source, tmp_path_factory.mktemp("quantized") / kind, quantized), quantized
        return made[kind]

    return make


def test_dense_tensors_have_the_published_layout(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(24, 128), group_size=64, rounds=8)
    tensors = to_tensors("p", weight)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "p.qweight": (torch.int32, (128, 3)),
        "p.qzeros": (torch.int32, (2, 3)),
        "p.scales": (torch.float16, (2, 24)),
        "p.theta": (torch.float16, (8, 64)),
        "p.pairs": (torch.int16, (8, 128)),
        "p.channel_scales": (torch.float16, (1, 128)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["p.qweight"][5, 1] & 15 == weight.codes[8, 5]
    assert tensors["p.qzeros"][1, 2] & 15 == weight.points[16, 1]
    assert tensors["p.scales"][1, 7] == weight.steps[7, 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "in_features", "rounds"), [(24, 64, 4), (11, 50, 1), (5, 20, 0)])
def test_from_tensors_undoes_to_tensors(
    by_rounding: ByRounding, bits: int, out: int, in_features: int, rounds: int
) -> None:
    weight = by_rounding(torch.randn(out, in_features), bits=bits, rounds=rounds)
    assert_same(from_tensors("p", to_tensors("p", weight), out, in_features, bits, 32), weight)


def test_experts_share_a_transform_and_gate_is_the_first_half(by_rounding: ByRounding) -> None:
    weight = by_rounding(torch.randn(3 * 2 * 8, 64))
    tensors = to_tensors("b.mlp.experts.gate_up_proj", weight, experts=3)
    assert len(tensors) == 3 * 2 * 3 + 3
    assert tensors["b.mlp.experts.gate_up_weight_theta"].shape == (4, 32)
    second = {part: tensors[f"b.mlp.experts.1.up_proj.{part}"] for part in ("qweight", "qzeros", "scales")}
    alone = dataclasses.replace(
        weight, codes=weight.codes[24:32], points=weight.points[24:32], steps=weight.steps[24:32]
    )
    for part, tensor in second.items():
        assert torch.equal(tensor, to_tensors("p", alone)[f"p.{part}"])
    assert_same(from_tensors("b.mlp.experts.gate_up_proj", tensors, 48, 64, 4, 32), weight)
    down = by_rounding(torch.randn(3 * 64, 32))
    tensors = to_tensors("b.mlp.experts.down_proj", down, experts=3)
    assert {"b.mlp.experts.2.down_proj.qweight", "b.mlp.experts.down_weight_pairs"} <= set(tensors)
    assert_same(from_tensors("b.mlp.experts.down_proj", tensors, 192, 32, 4, 32), down)


def swap_channels(pairs: Tensor) -> Tensor:
    pairs = pairs.clone()
    pairs[1, 40] = pairs[1, 41]
    return pairs


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.clone().index_fill_(-1, torch.tensor([0]), value)


BROKEN: list[tuple[str, Callable[[Tensor], Tensor] | None, str]] = [
    ("theta", None, r"p.theta: missing, expected float16 \(4, 32\)"),
    ("qzeros", None, "p.qzeros: missing"),
    ("theta", lambda t: t[:, :-2], r"p.theta: got float16 \(4, 30\), expected float16 \(4, 32\)"),
    ("theta", lambda t: t.float(), "p.theta: got float32"),
    ("pairs", lambda t: t.int(), "p.pairs: got int32"),
    ("qweight", lambda t: t[:-1], r"p.qweight: got int32 \(63, 3\), expected int32 \(64, 3\)"),
    ("scales", lambda t: t.t(), r"p.scales: got float16 \(24, 2\)"),
    ("pairs", swap_channels, "p: pairs: the pairs of round 1, group 1 are no permutation"),
    ("theta", set_first(float("nan")), "p: theta has values that are NaN"),
    ("scales", set_first(float("inf")), "p: scales has values that are NaN or infinite"),
    ("channel_scales", set_first(float("nan")), "p: channel_scales has values that are NaN"),
    ("scales", torch.zeros_like, "p: scales: no step size is above 0"),
]


@pytest.mark.parametrize(("part", "damage", "message"), BROKEN)
def test_damaged_tensors_are_named(
    by_rounding: ByRounding, part: str, damage: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    tensors = to_tensors("p", by_rounding(torch.randn(24, 64)))
    old = tensors.pop(f"p.{part}")
    if damage is not None:
        tensors[f"p.{part}"] = damage(old)
    with pytest.raises(CheckpointError, match=message):
        from_tensors("p", tensors, 24, 64, 4, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(written: Written, kind: str) -> None:
    folder, quantized = written(kind)
    read = read_quantized(folder)
    assert set(read) == set(quantized)
    for name, weight in quantized.items():
        assert_same(read[name], weight)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_again_gives_the_same_bytes(
    written: Written, tiny_folder: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    folder, _ = written(kind)
    for number, source in enumerate((tiny_folder(kind), folder)):
        again = write(source, tmp_path / str(number), read_quantized(folder))
        for file in ("model.safetensors", "config.json", "luthier.json"):
            assert (again / file).read_bytes() == (folder / file).read_bytes(), (number, file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_published_form(written: Written, tiny_folder: Callable[[str], Path], kind: str) -> None:
    folder, quantized = written(kind)
    source = json.loads((tiny_folder(kind) / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "paroquant", "bits": 4, "group_size": 32, "krot": 4}
    assert config == {**source, "quantization_config": settings}
    tensors, before = load_file(folder / "model.safetensors"), load_file(tiny_folder(kind) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int16, torch.int32}
    ordinary = {name for name in before if f"{name.removesuffix('.weight')}.qweight" not in tensors}
    assert ordinary <= set(tensors)
    assert {name for name in tensors if name.endswith(".weight")} == {n for n in ordinary if n.endswith(".weight")}
    assert all(torch.equal(tensors[name], before[name].half()) for name in ordinary)
    assert ("lm_head.weight" in tensors) == (kind != "qwen3")
    assert sum(name.endswith(".qweight") for name in tensors) >= len(quantized)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((folder / "luthier.json").read_text())["weights"].keys() == {"model.safetensors"}


def test_a_second_copy_of_a_tied_head_is_left_out(
    written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, quantized = written("qwen3")
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(tiny_folder("qwen3") / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((tiny_folder("qwen3") / "config.json").read_bytes())
    out = write(source, tmp_path / "out", quantized)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_fused_and_single_experts_give_the_same_checkpoint(
    written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, quantized = written("qwen3-moe")
    single = load_file(tiny_folder("qwen3-moe") / "model.safetensors")
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in single
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3-moe"))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused/model.safetensors")
    out = write(tmp_path / "fused", tmp_path / "out", quantized)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for source in ("fused", tiny_folder("qwen3-moe"), folder):
        pseudo = write(tmp_path / source, tmp_path / "pseudo", quantized, pseudo=True, dtype=torch.float32)
        experts = AutoModelForCausalLM.from_pretrained(pseudo).model.layers[1].mlp.experts
        for part in ("gate_up_proj", "down_proj"):
            weight = quantized[f"model.layers.1.mlp.experts.{part}"].dequantized()
            torch.testing.assert_close(getattr(experts, part).detach().flatten(0, 1), weight, rtol=0, atol=0)


def test_pseudo_weights_are_an_ordinary_model(
    written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    _, quantized = written("llama")
    pseudo = write(tiny_folder("llama"), tmp_path / "pseudo", quantized, pseudo=True, dtype=torch.bfloat16)
    config = json.loads((pseudo / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    before, after = load_file(tiny_folder("llama") / "model.safetensors"), load_file(pseudo / "model.safetensors")
    assert before.keys() == after.keys()
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(after[f"{name}.weight"], quantized[name].dequantized(torch.bfloat16))


class OneAtATime(Mapping[str, QuantizedWeight]):
    """Forgets the matrix it gave before, and counts."""

    def __init__(self, quantized: dict[str, QuantizedWeight]) -> None:
        self.quantized, self.asked = quantized, list[str]()

    def __getitem__(self, name: str) -> QuantizedWeight:
        self.asked.append(name)
        return self.quantized[name]

    def __iter__(self) -> Any:
        return iter(self.quantized)

    def __len__(self) -> int:
        return len(self.quantized)


def test_shards_and_order(written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, quantized = written("qwen3-moe")
    lazy = OneAtATime(quantized)
    out = write(tiny_folder("qwen3-moe"), tmp_path / "out", lazy, shard_bytes=20_000)
    assert sorted(lazy.asked) == sorted(quantized)
    layers = [name.split(".")[2] for name in lazy.asked]
    assert layers == sorted(layers), "a layer is read whole before the next"
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], whole[name])
    for name, weight in read_quantized(out).items():
        assert_same(weight, quantized[name])


def test_padding_is_remembered(by_rounding: ByRounding, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("olmo2"))
    name = "model.layers.0.self_attn.o_proj"
    weight = by_rounding(model.get_submodule(name).weight.detach(), group_size=128)
    out = write(tiny_folder("olmo2"), tmp_path / "out", {name: weight})
    assert json.loads((out / "config.json").read_text())["quantization_config"]["in_features"] == {name: 64}
    assert_same(read_quantized(out)[name], weight)


def test_other_files_come_along(written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_folder("olmo2").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    kept = {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    for name in (*kept, "README.md", "pytorch_model.bin", ".hidden", "luthier.json"):
        (source / name).write_text("{}")
    out = write(source, tmp_path / "out", written("olmo2")[1])
    assert {file.name for file in out.iterdir()} == {*kept, "config.json", "model.safetensors", "luthier.json"}
    assert "weights" in json.loads((out / "luthier.json").read_text())


def refused(message: str, source: Path, out: Path, quantized: Mapping[str, QuantizedWeight], **options: Any) -> None:
    (out / "before").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=message):
        write(source, out, quantized, **options)
    assert [file.name for file in out.iterdir()] == ["before"], "what was there is kept"
    assert not list(out.parent.glob(".*partial"))


def test_matrices_that_do_not_fit_are_refused(
    by_rounding: ByRounding, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, name = tiny_folder("llama"), "model.layers.0.mlp.up_proj"
    good = by_rounding(torch.randn(128, 64))
    refused("layers.7.*no such weight", source, tmp_path / "a", {"model.layers.7.mlp.up_proj": good})
    refused(
        r"quantized as \(64, 128\), but the source has \(128, 64\)",
        source,
        tmp_path / "b",
        {name: by_rounding(torch.randn(64, 128))},
    )
    refused(
        "bits 3, but other matrices have 4",
        source,
        tmp_path / "c",
        {name: good, "model.layers.1.mlp.up_proj": by_rounding(torch.randn(128, 64), bits=3)},
    )
    broken = dataclasses.replace(good, theta=good.theta / 0)
    refused("up_proj: theta has values that are NaN", source, tmp_path / "d", {name: broken})
    refused("no such model folder", tmp_path / "none", tmp_path / "e", {name: good})


def test_half_quantized_experts_are_refused(
    written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    quantized = {name: weight for name, weight in written("qwen3-moe")[1].items() if not name.endswith("s.down_proj")}
    refused("gate_up_proj: quantized without .*down_proj", tiny_folder("qwen3-moe"), tmp_path / "out", quantized)


def test_values_beyond_the_dtype_are_refused(
    written: Written, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(tiny_folder("olmo2") / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((tiny_folder("olmo2") / "config.json").read_bytes())
    refused(
        "model.norm.weight: has a value of 1e.05, which float16 cannot hold",
        source,
        tmp_path / "out",
        written("olmo2")[1],
    )


def test_some_matrices_of_a_quantized_source_are_refused(written: Written, tmp_path: Path) -> None:
    folder, quantized = written("olmo2")
    fewer = dict(list(quantized.items())[1:])
    refused("quantized in the source, but not among", folder, tmp_path / "out", fewer)
    with pytest.raises(CheckpointError, match="is the source itself"):
        write(folder, folder, quantized)


def test_folders_that_are_not_quantized_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantization method none, expected paroquant"):
        read_quantized(tiny_folder("llama"))
    with pytest.raises(CheckpointError, match="no such model folder"):
        read_quantized(tmp_path / "none")
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    awq = {**config, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(awq))
    with pytest.raises(CheckpointError, match="has no model"):
        read_quantized(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantization method awq"):
        read_quantized(tmp_path)
    empty = {**config, "quantization_config": {"quant_method": "paroquant"}}
    (tmp_path / "config.json").write_text(json.dumps(empty))
    with pytest.raises(CheckpointError, match="no tensor of it ends in"):
        read_quantized(tmp_path)
