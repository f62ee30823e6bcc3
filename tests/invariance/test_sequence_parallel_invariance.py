"""Rows that two ranks compute together teach what they teach one rank."""

from __future__ import annotations

import pytest
import torch

LONGER = {"verb": "extend", "sequence_length": 64, "batch_size": 4, "micro_batch_size": 4, "steps": 4}


@pytest.mark.slow
def test_extending_with_shared_rows_equals_one_rank(runs):
    settings = {**LONGER, "start": runs.folder / "straight" / "model"}
    runs.finish("whole-rows", **settings)
    runs.finish("shared-rows", ranks=2, sequence_parallel=2, **settings)
    assert runs.losses("shared-rows") == pytest.approx(runs.losses("whole-rows"), abs=1e-5)
    assert runs.losses("shared-rows", "eval") == pytest.approx(runs.losses("whole-rows", "eval"), abs=1e-5)
    one, two = runs.weights("whole-rows"), runs.weights("shared-rows")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_groups_of_two_ranks_equal_one_rank(runs):
    """Each group reads half of the rows; a state of one rank goes on there."""
    settings = {**LONGER, "start": runs.folder / "straight" / "model"}
    runs.finish("grouped-rows", code=130, stop_after=2, **settings)
    runs.finish("grouped-rows", ranks=4, sequence_parallel=2, **settings)
    runs.finish("whole-rows", **settings)
    assert runs.losses("grouped-rows") == pytest.approx(runs.losses("whole-rows"), abs=1e-5)


def test_a_group_larger_than_the_launch_is_refused(runs, capsys):
    settings = {**LONGER, "start": runs.folder / "straight" / "model"}
    runs.finish("too-few-ranks", code=2, sequence_parallel=2, **settings)
    told = capsys.readouterr().err
    assert "sequence_parallel: got 2, which does not divide the 1 ranks" in told
    assert "torchrun" in told
