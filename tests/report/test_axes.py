from __future__ import annotations

import itertools

from luthier.report.axes import LABEL_GAP, Line, needs_log, spread


def test_spread_moves_only_what_overlaps() -> None:
    assert spread([0.0, 100.0], LABEL_GAP) == [0.0, 100.0]
    assert spread([50.0, 50.0], 10) == [45.0, 55.0]
    moved = spread([10.0, 11.0, 12.0, 30.0], 10)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved == sorted(moved)


def test_log_only_for_positive_values_over_a_wide_range() -> None:
    assert needs_log([Line(x=[0, 1], y=[2.0, 9.0])])
    assert not needs_log([Line(x=[0, 1], y=[2.0, 3.0])])
    assert not needs_log([Line(x=[0, 1], y=[0.0, 9.0])])
    assert not needs_log([])
