from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def done(luthier: Command, trained: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model that was rounded to 4 bits."""
    out = tmp_path_factory.mktemp("rounded") / "run"
    sizes = ("--group-size", "32", "--samples", "2", "--validation-samples", "1", "--sequence-length", "16")
    model = trained / "model"
    outcome = luthier("quantize", model, "-o", out, "--method", "rtn", "--data", text_file, *sizes, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    return out


def test_bits_and_readers_are_printed(luthier: Command, done: Path) -> None:
    outcome = luthier("inspect", done / "model")
    assert outcome.code == 0, outcome.err
    for words in (
        "codes, bits/weight",
        "body, all together",
        "embeddings",
        "rotation rounds K",
        "vLLM",
        "metadata, bits/weight",
    ):
        assert words in outcome.out


def test_a_run_folder_stands_for_its_model(luthier: Command, done: Path) -> None:
    found = [json.loads(luthier("inspect", folder, "--json").out) for folder in (done, done / "model")]
    assert found[0] == found[1]
    assert found[0]["group_size"] == 32
    assert found[0]["bits_per_weight"]["all"] > 4.5
    assert all(reader["reasons"] for reader in found[0]["readers"])  # none knows the architecture


def test_other_folders_are_refused(luthier: Command, done: Path, trained: Path, tmp_path: Path) -> None:
    assert "no such model folder" in luthier("inspect", tmp_path / "missing").error
    assert "has no config.json" in luthier("inspect", tmp_path).error
    assert "quantization method none" in luthier("inspect", trained / "model").error
    broken = Path(shutil.copytree(done / "model", tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a complete safetensors file" in luthier("inspect", broken).error
