from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.files import sha256_file
from luthier.core.run import RunFolder
from luthier.data.shards import TokenShards
from luthier.entropy.targets import TRANSFER, TokenTargets
from luthier.learn import loop

Command = Callable[..., Any]
NETWORK = [
    *("--folds", "2", "--steps", "4", "--eval-every", "2", "--batch-size", "2", "--sequence-length", "16"),
    *("--warmup-steps", "1", "--vocab-size", "280", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def short_text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 4 kB of the text."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text(text_file.read_text()[:4000])
    return path


@pytest.fixture(scope="module")
def done(luthier: Command, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run with networks; copy it before you change it."""
    out = tmp_path_factory.mktemp("targets") / "run"
    outcome = luthier("targets", "--data", short_text, "--out", out, *NETWORK)
    assert outcome.code == 0, outcome.err
    assert f"targets: {out / 'targets'}" in outcome.out
    assert "2 cross-fitted models" in outcome.out
    return out


def test_every_token_has_a_target_and_the_index_says_who_made_it(done: Path) -> None:
    targets = TokenTargets.open(done / "targets", TokenShards.open(done / "data" / "tokens"))
    assert (targets.kind, targets.source, targets.folds) == ("surprisal", "cross-fit", 2)
    assert (targets.values > 0).all()
    assert [model["fold"] for model in targets.models] == [0, 1]
    for model in targets.models:
        assert model["best_step"] in (2, 4)
        weights = done / "checkpoints" / f"fold-{model['fold']}" / "best.safetensors"
        assert model["weights"] == sha256_file(weights)
    run = RunFolder.read(done)
    assert run.summary["headline"]["made by"] == "2 cross-fitted models"
    assert "Targets" in (done / "report.html").read_text()


def test_stopping_in_a_fold_and_going_on_gives_the_same_targets(
    luthier: Command, short_text: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("targets", "--data", short_text, "--out", tmp_path / "run", *NETWORK)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "LoopSettings", partial(loop.LoopSettings, stop_after=3))
        stopped = luthier(*command)
    assert stopped.code == 130
    assert stopped.error == "stopped in fold 1 of 2, state saved"
    resumed = luthier(*command)
    assert resumed.code == 0, resumed.err
    assert "resuming at step 3" in resumed.err
    assert sha256_file(tmp_path / "run" / "targets" / "targets.bin") == sha256_file(done / "targets" / "targets.bin")


def test_a_finished_run_trains_nothing_again(luthier: Command, short_text: Path, done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "run")
    weights = copy / "checkpoints" / "fold-0" / "best.safetensors"
    before = weights.stat().st_mtime_ns
    outcome = luthier("targets", "--data", short_text, "--out", copy, *NETWORK, "--json")
    assert outcome.code == 0, outcome.err
    assert weights.stat().st_mtime_ns == before
    assert json.loads(outcome.out)["sha256"] == sha256_file(done / "targets" / "targets.bin")


def test_counts_need_no_training(luthier: Command, text_file: Path, tmp_path: Path) -> None:
    command = ("targets", "--data", text_file, "--model", "counts", "--vocab-size", 300, "--folds", 3)
    for kind in ("surprisal", "entropy"):
        out = tmp_path / kind
        outcome = luthier(*command, "--out", out, "--kind", kind, "--order", 1, "--json")
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        targets = TokenTargets.open(Path(result["targets"]), TokenShards.open(out / "data" / "tokens"))
        assert targets.kind == result["kind"] == kind
        assert float(targets.values.astype(np.float64).mean()) == pytest.approx(result["mean"], rel=1e-3)
        assert [model["model"] for model in targets.models] == ["counts of order 1"] * 3


def test_a_teacher_scores_shards_made_earlier_and_is_called_transfer(
    luthier: Command, trained: Path, tmp_path: Path
) -> None:
    shards = trained / "data" / "train-0"
    outcome = luthier("targets", "--data", shards, "--teacher", trained / "model", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert TRANSFER in outcome.err
    assert TRANSFER in outcome.out
    assert "an external model" in outcome.out
    targets = TokenTargets.open(tmp_path / "run" / "targets", TokenShards.open(shards))
    assert (targets.source, targets.folds) == ("external", 0)
    (model,) = targets.models
    assert model["weights"] == {"model.safetensors": sha256_file(trained / "model" / "model.safetensors")}


def test_what_cannot_be_done_is_said(luthier: Command, trained: Path, text_file: Path, tmp_path: Path) -> None:
    shards, out = trained / "data" / "train-0", ("--out", tmp_path / "run")
    assert "are token shards" in luthier("targets", "--data", shards, *out).error
    assert luthier("targets", "--folds", 0, *out).error == "folds: got 0, expected 1 or more"
    counts = ("--data", text_file, "--model", "counts", "--vocab-size", 300)
    assert luthier("targets", *counts, "--folds", 1, *out).error == "folds: got 1, expected at least 2"
    assert "cannot be dealt into 500 folds" in luthier("targets", *counts, "--folds", 500, *out).error
    too_long = luthier("targets", "--data", shards, "--teacher", trained / "model", "--context", 4096, *out)
    assert too_long.error.startswith("context: got 4096")
