from __future__ import annotations

import math
from typing import Any

import pytest

from luthier.core.stats import wilson
from luthier.tasks.likelihood_metrics import chosen, is_right, measured, summarize


def row(logprobs: list[float], *, gold: int = 0, status: str = "correct", **more: Any) -> dict[str, Any]:
    ones = [1] * len(logprobs)
    values = {"logprobs": logprobs, "tokens": ones, "bytes": ones, "greedy": [False] * len(logprobs)}
    return {"gold": gold, "options": len(logprobs), "status": status} | values | more


def test_a_choice_must_beat_all_others() -> None:
    assert chosen([-2.0, -1.0, -3.0]) == 1
    assert chosen([-1.0, -1.0, -3.0]) is None
    assert chosen([-math.inf, -5.0]) == 1
    assert chosen([math.nan, -1.0]) is None
    assert chosen([-1.0, math.nan]) is None
    assert not is_right(row([0.0, 0.0]), "sum")  # a model that finds all alike is right nowhere


def test_each_measure_can_choose_another_option() -> None:
    found = row(
        [-4.0, -9.0, -10.0, -9.5], tokens=[1, 9, 3, 3], bytes=[2, 3, 20, 5], unconditional=[-4.0, -9.0, -12.0, -99.0]
    )
    assert measured(found)["token"] == pytest.approx([-4.0, -1.0, -10 / 3, -9.5 / 3])
    assert measured(found)["unconditional"] == pytest.approx([0.0, 0.0, 2.0, 89.5])
    choices = {name: chosen(values) for name, values in measured(found).items()}
    assert choices == {"sum": 0, "token": 1, "byte": 2, "unconditional": 3}


def test_accuracy_counts_failures_as_wrong_and_says_what_guessing_gives() -> None:
    rows: list[dict[str, Any]] = [row([-1.0, -2.0]), row([-2.0, -1.0]), row([-1.0, -2.0, -3.0, -4.0])]
    rows.append({"gold": 0, "options": 2, "status": "failed"})
    result = summarize("choice", rows)
    assert result.accuracy["byte"] == wilson(2, 4)
    assert result.chance == (0.5 + 0.5 + 0.25 + 0.5) / 4
    assert (result.failed, result.perplexity) == (1, None)
    assert set(result.accuracy) == {"sum", "token", "byte"}
    with_all = [row([-1.0, -2.0], unconditional=[-2.0, -1.0])] * 2
    assert set(summarize("choice", with_all).accuracy) == {"sum", "token", "byte", "unconditional"}


def test_targets_have_greedy_accuracy_and_perplexity() -> None:
    rows = [row([-math.log(2)], greedy=[True]), row([-math.log(8)], greedy=[False])]
    result = summarize("target", rows)
    assert result.accuracy == {"greedy": wilson(1, 2)}
    assert result.perplexity is not None
    assert result.perplexity.value == pytest.approx(4.0)  # the geometric mean
    assert 2.0 - 1e-9 <= result.perplexity.low < result.perplexity.high <= 8.0 + 1e-9
    assert summarize("target", [{"gold": 0, "options": 1, "status": "failed"}]).perplexity is None
