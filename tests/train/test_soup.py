from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.core.config import build
from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.files import sha256_file
from luthier.models.tensor_files import TensorFiles
from luthier.train.soup import Member, check_alike, mean_tensors, soup, weighted_mean
from luthier.train.soup_config import SoupConfig

Command = Callable[..., Any]


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.w": (16, 8), "layers.0.norm.weight": (8,), "layers.10.w": (8, 16), "head.w": (32, 8)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def member(folder: Path, tensors: Mapping[str, Tensor], tokenizer: str = "t", **config: object) -> Member:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 8, **config}))
    (folder / "tokenizer.json").write_text("{}")
    return Member.open(folder, tokenizer)


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    return [member(tmp_path / str(seed), random_tensors(seed)) for seed in range(3)]


def test_the_mean_is_torchs_mean(members: list[Member]) -> None:
    for name, tensor in mean_tensors(members, (1.0, 1.0, 1.0)):
        expected = torch.stack([random_tensors(seed)[name] for seed in range(3)]).mean(0)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)


def test_weights_are_shares_on_any_scale(members: list[Member]) -> None:
    one, other = dict(mean_tensors(members, (1.0, 2.0, 5.0))), dict(mean_tensors(members, (0.125, 0.25, 0.625)))
    for name, tensor in one.items():
        expected = sum(random_tensors(seed)[name] * share for seed, share in enumerate((0.125, 0.25, 0.625)))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


def test_bf16_is_summed_in_fp32_and_rounded_once() -> None:
    """1 + 2⁻⁸ lies between two bf16 numbers: adding the small parts to 1 in bf16 one by one would lose them all."""
    parts = [torch.tensor([value]).bfloat16() for value in (1.0, 2**-8, 2**-8, 2**-8)]
    mean = weighted_mean(iter(parts), (1.0,) * 4)
    in_steps = parts[0] + parts[1] + parts[2] + parts[3]
    assert mean.dtype == torch.bfloat16
    assert mean.item() == torch.tensor((1 + 3 * 2**-8) / 4).bfloat16().item()
    assert mean.item() != (in_steps / 4).item()


def test_fp64_stays_fp64() -> None:
    mean = weighted_mean(
        [torch.tensor([1.0], dtype=torch.float64), torch.tensor([1 + 2**-40], dtype=torch.float64)], (1, 1)
    )
    assert mean.item() == 1 + 2**-41


class Counted(Mapping[str, Tensor]):
    """Tensors of a member that count how many of all members are alive at once."""

    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    reads: ClassVar[list[str]] = []
    most: ClassVar[int] = 0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name].clone()
        Counted.alive.add(tensor)
        Counted.reads.append(name)
        Counted.most = max(Counted.most, len(Counted.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.tensors[name].dtype, tuple(self.tensors[name].shape)


def test_tensors_are_read_one_at_a_time_when_they_are_needed(members: list[Member]) -> None:
    counted = [
        Member(folder=one.folder, config={}, tensors=Counted(random_tensors(seed)), tokenizer="")  # type: ignore[arg-type]
        for seed, one in enumerate(members)
    ]
    made = mean_tensors(counted, (1.0, 1.0, 1.0))
    first = next(made)
    assert Counted.reads == [first[0]] * 3
    del first
    for _ in made:
        pass
    assert len(Counted.reads) == 3 * 4
    assert Counted.most <= 2  # the one being read, and the one before it


def test_shards_go_in_and_come_out(tmp_path: Path, members: list[Member]) -> None:
    """Members may be cut into files in different ways; so may the result."""
    soup(members, (1, 1, 1), tmp_path / "whole", {})
    sharded = tmp_path / "sharded"
    shutil.copytree(members[0].folder, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[:1], names[1:]), 1):
        save_file({name: tensors[name] for name in part}, sharded / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name in names[:1] else 2}-of-00002.safetensors" for name in names}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    count = soup(
        [Member.open(sharded, "t"), *members[1:]], (1, 1, 1), tmp_path / "out", {"verb": "soup"}, shard_bytes=600
    )
    assert count == 16 * 8 + 8 + 8 * 16 + 32 * 8
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) == 3
    whole, out = TensorFiles.of_folder(tmp_path / "whole"), TensorFiles.of_folder(tmp_path / "out")
    assert list(whole) == list(out)
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert list(json.loads((tmp_path / "out" / "luthier.json").read_text())["weights"]) == sorted(
        path.name for path in (tmp_path / "out").glob("*.safetensors")
    )


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "settings", "told"),
    [
        (without(random_tensors(1), "head.w"), {}, r"1 tensors missing: head\.w"),
        ({**random_tensors(1), "extra": torch.ones(1)}, {}, "1 tensors too many: extra"),
        (
            {**random_tensors(1), "head.w": torch.ones(31, 8)},
            {},
            r"head\.w \(\[31, 8\] float32, not \[32, 8\] float32\)",
        ),
        (random_tensors(1, torch.bfloat16), {}, r"4 unlike: head\.w \(\[32, 8\] bfloat16, not \[32, 8\] float32\)"),
        (random_tensors(1), {"hidden_size": 9}, "hidden_size is 9, not 8"),
        (random_tensors(1), {"rope_theta": 5}, "rope_theta is 5, not None"),
        (random_tensors(1), {"tokenizer": "other"}, "another tokenizer"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], told: str) -> None:
    first, other = member(tmp_path / "a", random_tensors(0)), member(tmp_path / "b", tensors, **settings)
    with pytest.raises(CheckpointError, match=told) as refused:
        soup([first, other], (1, 1), tmp_path / "out", {})
    assert str(tmp_path / "b") in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_versions_and_names_may_differ(tmp_path: Path) -> None:
    check_alike(
        [
            member(tmp_path / "a", random_tensors(0), transformers_version="5.24.0"),
            member(tmp_path / "b", random_tensors(1), transformers_version="4.48.0", _name_or_path="x"),
        ]
    )


def test_codes_have_no_mean(tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "paroquant"}}
    both = [member(tmp_path / name, random_tensors(0), **settings) for name in "ab"]
    with pytest.raises(CheckpointError, match="is quantized"):
        check_alike(both)
    numbers = [member(tmp_path / f"i{i}", {"n": torch.tensor([i])}) for i in range(2)]
    assert dict(mean_tensors([numbers[1], numbers[1]], (1, 1)))["n"].item() == 1
    with pytest.raises(CheckpointError, match="n: integers that differ"):
        dict(mean_tensors(numbers, (1, 1)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"models": ["a"]}, "models: got 1, expected at least 2"),
        ({"models": ["a", "b"], "weights": [1]}, "weights: got 1 for 2 models"),
        ({"models": ["a", "b"], "weights": [1, 0]}, r"weights: got \(1\.0, 0\.0\), expected positive"),
        ({}, "models: required, but not given"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(SoupConfig, values)


def moved(source: Path, folder: Path, by: float) -> Path:
    """A copy of a model folder whose weights are all moved by a number."""
    shutil.copytree(source, folder)
    tensors = {name: tensor + by for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_verb_takes_runs_and_models_and_writes_a_model_folder(
    luthier: Command, trained: Path, tmp_path: Path
) -> None:
    other = moved(trained / "model", tmp_path / "other", 0.5)
    outcome = luthier("soup", trained, other, "-o", tmp_path / "soup", "--weights", "3", "1", "--json")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "soup" / "model"
    made = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in load_file(trained / "model" / "model.safetensors").items():
        torch.testing.assert_close(made[name], tensor + 0.125, rtol=0, atol=1e-6)
    parents = json.loads((folder / "luthier.json").read_text())["parents"]
    assert [entry["share"] for entry in parents] == [0.75, 0.25]
    for entry, source in zip(parents, (trained / "model", other), strict=True):
        assert entry["model"] == str(source)
        assert entry["weights"] == {"model.safetensors": sha256_file(source / "model.safetensors")}
    assert json.loads(outcome.out)["members"] == parents
    summary = json.loads((tmp_path / "soup" / "summary.json").read_text())
    assert summary["headline"]["models averaged"] == "2"
    assert (tmp_path / "soup" / "report.html").is_file()


def test_another_tokenizer_is_refused_by_the_verb(luthier: Command, trained: Path, tmp_path: Path) -> None:
    other = moved(trained / "model", tmp_path / "other", 0.5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = luthier("soup", trained, other, "-o", tmp_path / "soup")
    assert outcome.code == 2
    assert f"{other} does not fit {trained / 'model'}: another tokenizer" in outcome.error


def test_what_is_no_model_is_refused(luthier: Command, trained: Path, tmp_path: Path) -> None:
    outcome = luthier("soup", trained, tmp_path / "absent", "-o", tmp_path / "soup")
    assert outcome.code == 2
    assert "absent: no model folder" in outcome.error


def test_a_recipe_averages_its_stages(luthier: Command, trained: Path, tmp_path: Path) -> None:
    """`@name` is the folder of an earlier stage, here another soup."""
    other = moved(trained / "model", tmp_path / "other", 0.5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"- soup one: {{models: ['{trained}', '{other}']}}\n- soup two: {{models: ['@one', '@one/model', '{other}']}}\n"
    )
    outcome = luthier("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    made = load_file(tmp_path / "out" / "02-two" / "model" / "model.safetensors")
    for name, tensor in load_file(trained / "model" / "model.safetensors").items():
        torch.testing.assert_close(made[name], tensor + (0.25 + 0.25 + 0.5) / 3, rtol=0, atol=1e-6)
