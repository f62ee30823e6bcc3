"""What a run takes over from an earlier one is all of it, on any number of ranks, stopped or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.data.shards import TokenShards

SECOND = {"schedule": "linear", "warmup_steps": 0, "final_fraction": 0.0, "learning_rate": 1e-3, "seed": 5796}
LONGER = {"verb": "extend", "sequence_length": 64, "batch_size": 4, "micro_batch_size": 4, "steps": 4}


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def straight(runs) -> Path:
    """The run folder of stage 1."""
    return runs.folder / "straight"


@pytest.fixture(scope="module")
def second(runs, straight):
    """The name of a stage 2 that was trained without a stop."""
    runs.finish("second", start=straight, **SECOND)
    return "second"


def test_the_second_epoch_of_a_run_is_a_stage_of_its_own(runs, straight):
    """Epoch e is shuffled by seed + e. So a run of one epoch, and another from its state under the next seed, are one
    run of two epochs: weights, both moments and the count of AdamW's updates came over, bit by bit."""
    data = straight / "data"
    windows = TokenShards.open(data / "train-0").num_windows(32)
    shared = {"data": data / "train-0", "eval_data": data / "held-out", "tokenizer": data / "tokenizer"}
    shared |= {"batch_size": windows // 3, "micro_batch_size": 64, "eval_every": 0}
    shared |= {"schedule": "constant", "warmup_steps": 0}
    runs.finish("epochs-both", seed=1, steps=6, **shared)
    runs.finish("epoch-one", seed=1, steps=3, **shared)
    runs.finish("epoch-two", seed=2, steps=3, start=runs.folder / "epoch-one", **shared)
    assert runs.losses("epoch-one") + runs.losses("epoch-two") == runs.losses("epochs-both")
    assert_same_weights(runs.weights("epoch-two"), runs.weights("epochs-both"))


@pytest.mark.parametrize("stop", [1, 4])
def test_stage_two_resumes_its_own_state(runs, straight, second, stop):
    name = f"second-stopped-{stop}"
    runs.finish(name, start=straight, stop_after=stop, code=130, **SECOND)
    runs.finish(name, start=straight, **SECOND)
    assert runs.losses(name) == runs.losses(second)
    assert_same_weights(runs.weights(name), runs.weights(second))


def test_stage_two_on_two_ranks_equals_one(runs, straight, second):
    runs.finish("second-two-ranks", ranks=2, start=straight, **SECOND)
    assert runs.losses("second-two-ranks") == pytest.approx(runs.losses(second), abs=1e-5)
    assert runs.losses("second-two-ranks", "eval") == pytest.approx(runs.losses(second, "eval"), abs=1e-5)
    assert_same_weights(runs.weights("second-two-ranks"), runs.weights(second), 1e-4)


def test_weights_of_a_model_folder_reach_two_ranks_as_they_reach_one(runs, straight):
    """Each of two ranks fills a model without storage, one rank loads a whole one."""
    settings = {**SECOND, "start": straight / "model", "steps": 2}
    runs.finish("weights-one-rank", **settings)
    runs.finish("weights-two-ranks", ranks=2, **settings)
    assert runs.losses("weights-two-ranks") == pytest.approx(runs.losses("weights-one-rank"), abs=1e-5)
    assert_same_weights(runs.weights("weights-two-ranks"), runs.weights("weights-one-rank"), 1e-4)


@pytest.fixture(scope="module")
def longer(runs, straight):
    """The name of a phase 1 that was trained without a stop."""
    runs.finish("longer", start=straight / "model", **LONGER)
    return "longer"


def test_extending_resumes_its_own_state(runs, straight, longer):
    runs.finish("longer-stopped", start=straight / "model", stop_after=2, code=130, **LONGER)
    runs.finish("longer-stopped", start=straight / "model", **LONGER)
    assert runs.losses("longer-stopped") == runs.losses(longer)
    assert_same_weights(runs.weights("longer-stopped"), runs.weights(longer))


def test_the_second_phase_on_two_ranks_equals_one(runs, longer):
    """Its base is that of the law, whose table of angles every rank computes anew after the model got its storage."""
    settings = {**LONGER, "sequence_length": 128, "start": runs.folder / longer}
    runs.finish("longest", **settings)
    runs.finish("longest-two-ranks", ranks=2, **settings)
    assert runs.losses("longest-two-ranks") == pytest.approx(runs.losses("longest"), abs=1e-5)
    assert_same_weights(runs.weights("longest-two-ranks"), runs.weights("longest"), 1e-4)


def test_extending_by_nothing_is_pretraining_with_document_masks(runs, straight):
    settings = {"start": straight, "steps": 3, "schedule": "linear", "final_fraction": 0.001, "learning_rate": 1e-3}
    settings["document_mask"] = True
    runs.finish("masked", **settings)
    runs.finish("kept", verb="extend", theta="keep", **settings)
    assert runs.losses("kept") == runs.losses("masked")
    assert_same_weights(runs.weights("kept"), runs.weights("masked"))
