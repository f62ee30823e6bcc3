"""Rows computed by 2 and by 4 ranks together equal one process in which every document is read alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import ConfigError
from luthier.learn.parallel import Ranks
from luthier.learn.sequence_parallel import own_tokens

SCRIPT = Path(__file__).with_name("sequence_parallel_ranks.py")
CASES = [
    "plain",
    "documents",
    "ignored targets",
    "positions",
    "checkpointing",
    "llama",
    "llama with documents",
]


@pytest.fixture(scope="module")
def found(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the ranks computed, by their number."""
    results = {}
    for ranks in ("2", "4"):
        file = tmp_path_factory.mktemp("found") / "found.json"
        done = launch(int(ranks), SCRIPT, file)
        assert done.code == 0, done.out + done.err
        results[ranks] = json.loads(file.read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [("2", "compiled"), *product(("2", "4"), CASES)])
def test_ranks_equal_one_process(found: dict, ranks: str, case: str) -> None:
    result = found[ranks][case]
    counted, expected = result["targets"]
    assert counted == expected  # also those whose input is the last token of a rank
    assert result["tokens"] < 1e-5
    assert result["loss"] < 1e-5
    assert result["gradients"] < 1e-5


@pytest.mark.slow
def test_code_length_equals_one_process(found: dict) -> None:
    assert found["2"]["scored"] < 1e-5
    assert found["4"]["scored"] < 1e-5
    assert found["4"]["scored by two groups"] < 1e-5


@pytest.mark.slow
def test_heads_that_cannot_be_divided_are_refused(found: dict) -> None:
    assert found["4"]["refused"].startswith("sequence_parallel: got 4, which does not divide the 1 heads")


def test_ranks_form_groups_of_neighbors() -> None:
    who = [Ranks(rank, 4, sequence_parallel=2) for rank in range(4)]
    assert [(one.data_rank, one.sequence_rank) for one in who] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {one.data_size for one in who} == {2}


def test_a_group_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel: got 2, which does not divide the 3 ranks"):
        Ranks(0, 3, sequence_parallel=2)


def test_parts_of_a_row_make_the_row_and_documents_stay_whole() -> None:
    tokens = np.arange(26).reshape(2, 13)
    batch = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": np.zeros((2, 12))}
    parts = [own_tokens(batch, Ranks(rank, 4, sequence_parallel=4)) for rank in range(4)]
    for name in ("input_ids", "targets"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], 1), batch[name])
    assert all(part["document_ids"].shape == (2, 12) for part in parts)
    assert parts[0]["targets"][0, -1] == parts[1]["input_ids"][0, 0]  # the target at a border is not lost


def test_rows_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide rows of 13 tokens"):
        own_tokens({"input_ids": np.zeros((2, 13))}, Ranks(0, 2, sequence_parallel=2))
