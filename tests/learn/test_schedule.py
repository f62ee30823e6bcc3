from __future__ import annotations

import pytest

from luthier.learn.schedule import learning_rate

STAGE_1 = {"schedule": "cosine", "peak": 4e-4, "warmup": 2000, "total": 969_171, "final_fraction": 0.1}
STAGE_2 = {"schedule": "linear", "peak": 4e-5, "warmup": 0, "total": 13_727, "final_fraction": 0.0}
SFT = {"schedule": "linear", "peak": 1e-5, "warmup": 500, "total": 50_937, "final_fraction": 0.001}
LONG = {"schedule": "linear", "peak": 2e-5, "warmup": 500, "total": 5000, "final_fraction": 0.001}

# Values that follow from the published settings of each stage, to the digits given there.
ANCHORS = [
    (STAGE_1, 0, 4.000e-5),
    (STAGE_1, 1, 4.018e-5),
    (STAGE_1, 1000, 2.200e-4),
    (STAGE_1, 2000, 4.000e-4),
    (STAGE_1, 485_585, 2.2000029e-4),
    (STAGE_1, 800_000, 6.6499e-5),
    (STAGE_1, 969_171, 4.0e-5),
    (STAGE_2, 0, 4e-5),
    (STAGE_2, 1, 3.999709e-5),
    (STAGE_2, 6863, 2.000146e-5),
    (STAGE_2, 13_726, 2.914e-9),
    (STAGE_2, 13_727, 0.0),
    (SFT, 0, 1e-6),
    (SFT, 250, 5.5e-6),
    (SFT, 500, 1e-5),
    (SFT, 25_000, 5.1473e-6),
    (SFT, 50_937, 1e-8),
    (LONG, 0, 2e-6),
    (LONG, 500, 2e-5),
    (LONG, 2500, 1.112e-5),
    (LONG, 5000, 2e-8),
]


@pytest.mark.parametrize(("settings", "step", "expected"), ANCHORS)
def test_anchor_values_of_the_paper(settings, step, expected):
    assert learning_rate(step, **settings) == pytest.approx(expected, rel=1e-4, abs=1e-13)


def test_after_the_end_the_rate_stays_at_its_floor():
    assert learning_rate(60_000, **SFT) == learning_rate(50_937, **SFT)


def test_constant_keeps_the_peak_after_the_warmup():
    settings = {"schedule": "constant", "peak": 1.0, "warmup": 10, "total": 100, "final_fraction": 0.1}
    assert [learning_rate(step, **settings) for step in (0, 5, 10, 99, 1000)] == pytest.approx([0.1, 0.55, 1, 1, 1])
