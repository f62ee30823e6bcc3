"""Equivalent ways to run the same training give the same training."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stop", [1, 2, 3, 5])  # 3 is a step that is evaluated
def test_stop_anywhere_and_resume_equals_the_straight_run_bitwise(runs, stop, capsys):
    name = f"stopped-{stop}"
    runs.finish(name, code=130, stop_after=stop)
    assert f"stopped at step {stop} of 6" in capsys.readouterr().err
    runs.finish(name)
    assert f"resuming at step {stop}" in capsys.readouterr().err
    assert runs.losses(name) == runs.losses("straight")
    assert runs.losses(name, "eval") == runs.losses("straight", "eval")
    assert_same_weights(runs.weights(name), runs.weights("straight"))


def test_bf16_resumes_bitwise_too(runs):
    runs.finish("bf16-straight", precision="bf16", steps=4)
    runs.finish("bf16-stopped", precision="bf16", steps=4, stop_after=3, code=130)
    runs.finish("bf16-stopped", precision="bf16", steps=4)
    assert runs.losses("bf16-stopped") == runs.losses("bf16-straight")
    assert_same_weights(runs.weights("bf16-stopped"), runs.weights("bf16-straight"))


def test_accumulation_1x8_equals_8x1(runs):
    runs.finish("accumulated", micro_batch_size=1)
    assert runs.losses("accumulated") == pytest.approx(runs.losses("straight"), abs=1e-5)
    assert_same_weights(runs.weights("accumulated"), runs.weights("straight"), 1e-4)


def test_uneven_last_micro_batch_changes_nothing(runs):
    runs.finish("uneven", micro_batch_size=3)
    assert runs.losses("uneven") == pytest.approx(runs.losses("straight"), abs=1e-5)


def test_two_ranks_equal_one(runs):
    runs.torchrun("two-ranks", 2)
    assert runs.losses("two-ranks") == pytest.approx(runs.losses("straight"), abs=1e-5)
    assert runs.losses("two-ranks", "eval") == pytest.approx(runs.losses("straight", "eval"), abs=1e-5)
    assert_same_weights(runs.weights("two-ranks"), runs.weights("straight"), 1e-4)


def test_muon_on_two_ranks_equals_one_that_was_stopped(runs):
    runs.finish("muon-two-ranks", ranks=2, optimizer="muon")
    runs.finish("muon", optimizer="muon", stop_after=2, code=130)
    runs.finish("muon", optimizer="muon")
    assert runs.losses("muon-two-ranks") == pytest.approx(runs.losses("muon"), abs=1e-5)
    assert_same_weights(runs.weights("muon-two-ranks"), runs.weights("muon"), 1e-4)


def test_a_state_of_two_ranks_resumes_on_one_and_back(runs):
    runs.finish("resharded", ranks=2, stop_after=2, code=1)  # the launcher reports any early end as 1
    runs.finish("resharded", ranks=1, stop_after=2, code=130)
    runs.finish("resharded", ranks=2)
    assert runs.losses("resharded") == pytest.approx(runs.losses("straight"), abs=1e-5)
    assert_same_weights(runs.weights("resharded"), runs.weights("straight"), 1e-4)


def test_hybrid_sharding_equals_one_rank(runs):
    runs.finish("hybrid", ranks=4, shard_size=2, steps=2)
    assert runs.losses("hybrid") == pytest.approx(runs.losses("straight")[:2], abs=1e-5)


def test_activation_checkpointing_changes_nothing(runs):
    runs.finish("checkpointed", activation_checkpointing=True)
    assert runs.losses("checkpointed") == pytest.approx(runs.losses("straight"), abs=1e-5)


def test_a_run_resumes_with_another_micro_batch(runs):
    runs.finish("smaller", stop_after=3, code=130)
    runs.finish("smaller", micro_batch_size=2, activation_checkpointing=True)
    assert runs.losses("smaller") == pytest.approx(runs.losses("straight"), abs=1e-5)


def test_dropout_is_decided_by_the_seed_and_the_step(runs, tmp_path):
    GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(tmp_path)
    runs.finish("dropout-straight", model=tmp_path)
    runs.finish("dropout-stopped", model=tmp_path, stop_after=3, code=130)
    runs.finish("dropout-stopped", model=tmp_path)
    assert runs.losses("dropout-stopped") == runs.losses("dropout-straight")
    assert_same_weights(runs.weights("dropout-stopped"), runs.weights("dropout-straight"))


def test_what_the_first_rank_refuses_is_told_without_a_traceback(runs):
    code, output = runs.launch("refused", 2, data="nowhere.txt")
    assert code == 1
    assert "luthier: nowhere.txt: no such file or folder" in output
    assert "luthier (rank 1): stopped, because another rank failed" in output
    assert "[rank1]" not in output  # how torch marks a traceback
