from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.cli.quantize import empty_model, source_folder
from luthier.core.errors import CheckpointError
from luthier.core.run import RunFolder
from luthier.models.load import load_pretrained, read_provenance
from luthier.quantize import walk
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.plan import plan

Command = Callable[..., Any]
QUICK: dict[str, Any] = {
    "--group-size": 32,
    "--rounds": 2,
    "--samples": 6,
    "--validation-samples": 2,
    "--sequence-length": 16,
    "--epochs": (1, 1),
    "--device": "cpu",
    "--precision": "fp32",
}


def options(*more: Any) -> list[str]:
    """QUICK, with pairs of option and value in place of its own; None for a switch."""
    settings = {**QUICK, **dict(zip(more[::2], more[1::2], strict=True))}
    words = list[str]()
    for name, value in settings.items():
        words += [name, *(map(str, value) if isinstance(value, tuple) else [] if value is None else [str(value)])]
    return words


@pytest.fixture(scope="module")
def source(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return Path(shutil.copytree(trained / "model", tmp_path_factory.mktemp("source") / "model"))


@pytest.fixture
def quantize(luthier: Command, source: Path, text_file: Path) -> Command:
    """The verb on that model with a tiny recipe."""
    return lambda out, *more: luthier("quantize", source, "-o", out, *options("--data", text_file, *more))


@pytest.fixture(scope="module")
def done(luthier: Command, source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run; copy it before you change it."""
    out = tmp_path_factory.mktemp("quantized") / "run"
    outcome = luthier("quantize", source, "-o", out, *options("--data", text_file))
    assert outcome.code == 0, outcome.err
    assert f"luthier compare {source} {out / 'model'}" in outcome.out
    assert f"luthier chat {out / 'model'}" in outcome.out
    assert "memory at most" in outcome.out
    assert "estimated" in outcome.err
    return out


def test_the_model_is_smaller_and_close_to_the_original(done: Path, source: Path) -> None:
    quantized, original = (load_pretrained(folder, dtype=torch.float32) for folder in (done / "model", source))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a, b = original(ids).logits, quantized(ids).logits
    assert 0 < (a - b).norm() / a.norm() < 0.2
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (done / "model", source)]
    assert sizes[0] < 0.5 * sizes[1]


def test_the_run_folder_tells_all(done: Path, source: Path) -> None:
    run = RunFolder.read(done)
    headline = run.summary["headline"]
    assert float(headline["bits per weight, with metadata"]) > 4
    assert "(estimated" in headline["peak memory"]
    assert [table["title"] for table in run.summary["tables"]][1:] == ["Format", "Who can load it", "Layers"]
    rows = run.metrics("layer")
    assert [row["layer"] for row in rows] == list(range(len(rows)))
    assert all(row["relative_error"] > 0 for row in rows)
    page = (done / "report.html").read_text()
    assert "Validation loss by layer" in page
    assert "Relative error by layer" in page
    provenance = read_provenance(done / "model")
    assert provenance["verb"] == "quantize"
    assert provenance["parents"][0]["verb"] == "pretrain"
    assert provenance["data"][0]["name"].endswith("text.txt")


def test_the_plan_is_what_comes_out(done: Path, source: Path) -> None:
    run = RunFolder.read(done)
    config = QuantizeConfig(model=str(source), group_size=32, rounds=2)
    planned = plan(empty_model(str(source)), config)
    assert f"{sum(planned.body_bits):.3f}" == run.summary["headline"]["bits per weight, with metadata"]
    assert planned.layers == len(run.metrics("layer"))
    headers = 40_000  # of the file
    assert 0 < (done / "model" / "model.safetensors").stat().st_size - planned.file_bytes < headers


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "rotated-gptq"])
def test_every_baseline_has_its_own_report(quantize: Command, tmp_path: Path, method: str) -> None:
    outcome = quantize(tmp_path / "run", "--method", method, "--json", None)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["model"] == str(tmp_path / "run" / "model")
    assert "Validation loss by layer" in (tmp_path / "run" / "report.html").read_text()


def test_pseudo_weights_load_without_a_quantizer(quantize: Command, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    assert quantize(tmp_path / "run", "--pseudo", None, "--dtype", "float32").code == 0
    assert "quantization_config" not in (tmp_path / "run" / "model" / "config.json").read_text()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a, b = (load_pretrained(f / "model", dtype=torch.float32)(ids).logits for f in (tmp_path / "run", done))
    assert torch.allclose(a, b, atol=2e-2 * float(a.abs().max()))


def test_a_run_that_was_stopped_goes_on(
    quantize: Command, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = walk.save_layer, list[Path]()

    def stop_after_two(path: Path, *rest: Any) -> None:
        save(path, *rest)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(walk, "save_layer", stop_after_two)
    outcome = quantize(tmp_path / "run")
    assert outcome.code == 130
    assert "stopped with 2 of" in outcome.error
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert quantize(tmp_path / "run").code == 0
    a, b = ((folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", done))
    assert a == b


def test_a_finished_run_is_not_done_again(
    quantize: Command, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "run")
    monkeypatch.setattr(walk, "save_layer", lambda *rest: pytest.fail("a layer is made again"))
    before = RunFolder.read(done).summary
    assert quantize(tmp_path / "run").code == 0
    after = RunFolder.read(tmp_path / "run").summary
    assert after["memory"] == before["memory"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "qtip"], "--method: got 'qtip', expected one of paroquant, rtn"),
        (["--bits", "5"], "bits: got 5, expected one of 2, 3, 4, 8"),
        (["--group-size", "48"], "group_size: got 48, expected one of 32, 64, 128"),
        (["--rounds", "17"], "rounds: got 17, expected 0 to 16"),
        (["--preset", "slow"], "preset: got 'slow', expected one of quick, paper, moe"),
        (["--samples", "0"], "samples: got 0, expected 1 or more"),
        (["--data", "./missing.txt"], "missing.txt"),
        (["--samples", "100000"], "tokens"),
        (["--sequence-length", "100000"], "at most 32"),
        (["--device", "tpu0"], "device: got 'tpu0'"),
        (["--skip", "*"], "no linear module to quantize"),
    ],
)
def test_settings_that_cannot_be_used(quantize: Command, tmp_path: Path, arguments: list[str], told: str) -> None:
    outcome = quantize(tmp_path / "run", *arguments)
    assert outcome.code == 2
    assert told in outcome.error
    assert not (tmp_path / "run" / "model").exists()


def test_models_that_cannot_be_quantized(luthier: Command, done: Path, tmp_path: Path) -> None:
    for folder, told in (
        (tmp_path / "missing", "no such model folder"),
        (tmp_path, "has no config.json"),
        (done / "model", "is quantized already"),
    ):
        outcome = luthier("quantize", folder, "-o", tmp_path / "run", *options())
        assert outcome.code == 2
        assert told in outcome.error
    assert not (tmp_path / "run").exists()


def test_an_architecture_without_linear_layers_is_refused(luthier: Command, tmp_path: Path) -> None:
    small = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 32}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(small))
    outcome = luthier("quantize", tmp_path / "model", "-o", tmp_path / "run", *options())
    assert outcome.code == 2
    assert "no linear module to quantize" in outcome.error
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_stays_as_it_is(quantize: Command, done: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other")
    assert "holds a run with another config" in quantize(tmp_path / "other").error
    shutil.copytree(done, tmp_path / "mine")
    before = (tmp_path / "mine" / "model" / "model.safetensors").read_bytes()
    assert "bits: 4 -> 3" in quantize(tmp_path / "mine", "--bits", "3").error
    assert (tmp_path / "mine" / "model" / "model.safetensors").read_bytes() == before


def test_a_dry_run_needs_only_the_architecture(luthier: Command, source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(source / "config.json", tmp_path / "model")
    outcome = luthier("quantize", tmp_path / "model", "--bits", "3", "--dry-run", "--json", "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["codes"] == "3.061 bits per weight"  # some outputs do not fill words of 32 codes
    assert "peak at one time" in found
    assert not (tmp_path / "run").exists()


def test_the_papers_recipe_is_planned_without_a_network(luthier: Command, tmp_path: Path) -> None:
    outcome = luthier("run", "recipes/paroquant-qwen3-4b.yaml", "--dry-run", "--json", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["stages"]["quantize"]
    assert found["decoder layers"] == "36"
    assert found["weights in them"] == "3,633,315,840"
    assert found["calibration"] == "4,194,304 tokens in 2,048 windows"


def test_a_recipes_later_stages_are_not_planned_before_their_input_exists(luthier: Command, tmp_path: Path) -> None:
    outcome = luthier("run", "recipes/tour.yaml", "--dry-run", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "what it costs is known once pretrain has run" in outcome.out


def test_a_run_folder_stands_for_its_model(trained: Path) -> None:
    assert source_folder(str(trained)) == trained / "model"
    with pytest.raises(CheckpointError, match="no such model folder"):
        source_folder(str(trained / "modle"))


def test_other_verbs_take_the_quantized_model(luthier: Command, done: Path, source: Path, text_file: Path) -> None:
    model = done / "model"
    outcome = luthier("eval", model, "--data", text_file, "--no-compressors", "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "quantized products" in outcome.err
    outcome = luthier("chat", model, "--prompt", "the", "--max-tokens", "2", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "was only pretrained" in outcome.err
    outcome = luthier("bench", "decode", source, model, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1")
    assert outcome.code == 0, outcome.err
    assert f"{model}: " in outcome.out
