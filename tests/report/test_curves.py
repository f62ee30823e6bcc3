from __future__ import annotations

import math

import pytest

from luthier.report.curves import latest_by_step, measured_keys, points, smooth, thin, x_axis


def test_latest_by_step_keeps_the_row_written_last() -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 3.5}]
    assert [(row["step"], row["loss"]) for row in latest_by_step(rows)] == [(1, 3.5), (2, 2.0)]


def test_rows_without_steps_keep_their_order() -> None:
    rows = [{"loss": 3.0}, {"loss": 2.0}]
    assert latest_by_step(rows) == rows


@pytest.mark.parametrize(
    ("rows", "axis"),
    [
        ([{"step": 1, "tokens": 5}], "tokens"),
        ([{"step": 1, "tokens": 5}, {"step": 2}], "step"),
        ([{"loss": 1.0}], "row"),
        ([], "row"),
    ],
)
def test_x_axis_is_what_every_row_has(rows: list[dict[str, float]], axis: str) -> None:
    assert x_axis(rows) == axis


def test_points_turn_what_is_no_number_into_a_gap() -> None:
    rows = [{"step": 1, "loss": 2}, {"step": 2, "loss": float("inf")}, {"step": 3}, {"step": 4, "loss": None}]
    x, y = points(rows, "loss", "step")
    assert x == [1, 2, 4]
    assert y[0] == 2
    assert all(map(math.isnan, y[1:]))


def test_measured_keys_leaves_out_text_flags_and_single_values() -> None:
    rows = [
        {"step": 1, "kl": 0.1, "name": "a", "flag": True, "once": 1},
        {"step": 2, "kl": 0.2, "name": "b", "flag": True},
    ]
    assert measured_keys(rows) == ["kl"]


def test_smooth_keeps_constants_and_the_middle_of_lines() -> None:
    assert smooth([2.0] * 9, 5) == [2.0] * 9
    assert smooth([float(i) for i in range(9)], 5)[:7] == [float(i) for i in range(7)]


def test_smooth_reduces_noise_and_skips_nan() -> None:
    smoothed = smooth([1.0, -1.0] * 20, 10)
    assert max(map(abs, smoothed[5:])) < 0.2
    assert smooth([1.0, math.nan, 3.0], 3)[::2] == [1.0, 3.0]
    assert math.isnan(smooth([1.0, math.nan, 3.0], 3)[1])


def test_thin_keeps_ends_and_spikes() -> None:
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[1234], y[8765] = 7.0, math.nan
    few_x, few_y = thin(x, y, limit=200)
    assert len(few_x) <= 202
    assert (few_x[0], few_x[-1]) == (0.0, 9999.0)
    assert 7.0 in few_y
    assert few_x == sorted(few_x)


def test_thin_leaves_short_curves_alone() -> None:
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])
