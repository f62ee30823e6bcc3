from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from luthier.report.axes import Line
from luthier.report.figures import bits_per_byte, curve, loss, measurement


def texts(svg: str) -> list[str]:
    """What is written in a figure; parsing proves that it is well-formed."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_loss_names_unit_axis_and_lines() -> None:
    train = [{"step": i, "tokens": i * 1000, "loss": 9.0 / i} for i in range(1, 101)]
    held_out = [{"step": i, "tokens": i * 1000, "loss": 9.5 / i} for i in (50, 100)]
    written = texts(loss(train, held_out, name="f"))
    assert {"nats/token, log scale", "tokens", "train", "held-out"} <= set(written)


def test_bits_per_byte_marks_the_lowest_value_and_draws_a_band() -> None:
    rows = [{"step": i, "bits_per_byte": b, "low": b - 0.1, "high": b + 0.1} for i, b in ((1, 3.0), (2, 2.0), (3, 2.5))]
    svg = bits_per_byte(rows, name="f")
    assert "best 2" in texts(svg)
    assert "fill-opacity" in svg
    assert "fill-opacity" not in bits_per_byte([{"step": 1, "bits_per_byte": 2.0}], name="f")


def test_colors_are_variables_of_the_page() -> None:
    svg = curve([Line(x=[0, 1], y=[1, 2], label="a", best="max")], name="f", description="d")
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert "var(--line-1)" in colors
    assert all(color == "none" or color.startswith("var(--") for color in colors)


def test_same_rows_same_text_and_names_keep_ids_apart() -> None:
    rows = [{"step": i, "kl": float(i % 5)} for i in range(50)]
    assert measurement(rows, "kl", name="a") == measurement(rows, "kl", name="a")
    ids = [set(re.findall(r' id="([^"]+)"', measurement(rows, "kl", name=name))) for name in "ab"]
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("values", [[], [1e-6, 5.0], [2.0], [math.nan, math.nan], [0.0, 0.0], [-1.0, math.nan, 1e12]])
def test_odd_values_still_draw(values: list[float]) -> None:
    rows = [{"step": i, "loss": value} for i, value in enumerate(values)]
    assert "step" in texts(loss(rows, rows, name="f")) or not rows


def test_labels_and_descriptions_are_escaped() -> None:
    svg = curve([Line(x=[0, 1], y=[1, 2], label="<b>&")], name="f", description='"<x>"')
    assert "<b>&" in texts(svg)
    assert ElementTree.fromstring(svg).get("aria-label") == '"<x>"'
