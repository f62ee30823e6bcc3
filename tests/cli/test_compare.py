from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.files import write_json
from luthier.core.run import RunFolder
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.models.load import load_pretrained, read_provenance, save_pretrained

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def models(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `a`, `b`, the same with noise on its weights, and the text `text.txt` that A held out."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(trained / "model", folder / "a")
    model = load_pretrained(folder / "a")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 * weight.std() if weight.dim() > 1 else 0)
    save_pretrained(model, load_tokenizer(folder / "a"), folder / "b", {"verb": "test", "data": [{"name": "corpus"}]})
    (folder / "text.txt").write_text("the luthier planes the top of the violin until it rings.\n\n" * 60)
    return folder


@pytest.fixture
def compare(models: Path, luthier: Command, tmp_path: Path) -> Command:
    def run(a: str, b: str, *more: str | Path) -> Any:
        options = ["--data", models / "text.txt", "--context", "16", "--out", tmp_path / "run", "--device", "cpu"]
        return luthier("compare", models / a, models / b, *options, *more)

    return run


def test_the_result_is_printed_and_kept(compare: Command, tmp_path: Path) -> None:
    outcome = compare("a", "b", "--no-speed", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert 0 < found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"]
    assert found["kl_quantiles"]["50"] <= found["kl_quantiles"]["99"]
    assert 0 < found["agreement"]["value"] <= 1
    assert found["bytes"]["A"] > 0
    stored = RunFolder.read(tmp_path / "run")
    assert stored.summary["verb"] == "compare"
    assert [row["relative_error"] for row in stored.metrics("hidden")] == found["layer_errors"]
    assert len(stored.metrics("divergence")) == len(found["kl_quantiles"])
    assert "KL divergence over tokens" in Path(found["report"]).read_text()


def test_a_model_is_itself_and_the_same_command_writes_the_same_rows(compare: Command, tmp_path: Path) -> None:
    for _ in range(2):
        outcome = compare("a", "a", "--no-speed", "--json")
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert (found["kl"]["value"], found["agreement"]["value"]) == (0, 1)
        assert set(found["layer_errors"]) == {0}
    assert len(RunFolder.read(tmp_path / "run").metrics("hidden")) == len(found["layer_errors"])


def test_tables_name_speed_and_size(compare: Command) -> None:
    outcome = compare("a", "b")
    assert outcome.code == 0, outcome.err
    for words in ("KL(A‖B), mean", "decode, tokens/s", "weights on disk", "same first choice", "interleaved"):
        assert words in outcome.out


def test_the_calibration_text_is_pointed_out(compare: Command, models: Path) -> None:
    assert "B was calibrated on this very corpus" not in compare("a", "b", "--no-speed").out
    write_json(
        models / "b" / "luthier.json",
        {**read_provenance(models / "b"), "data": [{"name": str(models / "text.txt")}]},
    )
    assert "B was calibrated on this very corpus" in compare("a", "b", "--no-speed").out


def test_other_settings_get_another_folder(models: Path, luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    for context in ("16", "8", "8"):
        outcome = luthier("compare", "a", "b", "--data", "text.txt", "--context", context, "--no-speed")
        assert outcome.code == 0, outcome.err
    assert len(list((models / "runs").glob("compare-*"))) == 2


def test_models_with_other_tokenizers_are_refused(compare: Command, models: Path, text_file: Path) -> None:
    save_pretrained(
        load_pretrained(models / "a"), train_bpe([text_file.read_text()], 299), models / "c", {"verb": "test"}
    )
    assert "have different tokenizers" in compare("a", "c").error


def test_a_context_beyond_the_models_is_refused(models: Path, luthier: Command, tmp_path: Path) -> None:
    options = ["--data", models / "text.txt", "--context", "99999", "--out", tmp_path / "run"]
    outcome = luthier("compare", models / "a", models / "b", *options)
    assert "but the models read at most" in outcome.error


def test_a_missing_model_is_named(compare: Command) -> None:
    outcome = compare("a", "missing")
    assert outcome.code == 2
    assert "missing" in outcome.error
