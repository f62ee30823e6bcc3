"""Figures of quantized models: losses by layer, how an error grows through the layers, how divergence is spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.report import figures
from luthier.report.axes import Line
from luthier.report.curves import Row, number

# Key of the `layer` rows -> label, in the order in which a layer goes through them.
STAGES = {"loss_rounded": "rounded", "loss_stage1": "stage 1", "loss_fixed": "codes set", "loss_stage2": "stage 2"}


def losses_by_layer(rows: Sequence[Row], *, name: str) -> str:
    """The validation loss of each layer after each of its stages; '' without any."""
    lines = [
        Line(x=x, y=y, label=label, color=color, dots=True)
        for color, (key, label) in enumerate(STAGES.items())
        for x, y in [_points(rows, "layer", key)]
        if x
    ]
    if not lines:
        return ""
    text = f"validation loss by layer after {', '.join(line.label for line in lines)}"
    return figures.curve(lines, name=name, unit="loss", x_label="layer", description=text, scale="log")


def hidden_errors(rows: Sequence[Row], *, name: str) -> str:
    """The relative error of the hidden states after each layer; '' without any."""
    x, y = _points(rows, "layer", "relative_error")
    if not x:
        return ""
    line = Line(x=x, y=y, dots=True)
    text = "relative error of the hidden states by layer"
    return figures.curve([line], name=name, unit="‖A − B‖ / ‖A‖", x_label="layer", description=text, scale="zero")


def divergence_quantiles(rows: Sequence[Row], *, name: str) -> str:
    """The divergence that so many percent of the tokens stay below; '' without any."""
    x, y = _points(rows, "percent", "nats")
    shown = [(percent, nats) for percent, nats in zip(x, y, strict=True) if nats > 0]  # identical models have none
    if not shown:
        return ""
    line = Line(x=[percent for percent, _ in shown], y=[nats for _, nats in shown], dots=True)
    text = "quantiles of KL(A‖B) over tokens, in nats"
    return figures.curve([line], name=name, unit="nats", x_label="% of tokens", description=text, scale="log")


def _points(rows: Sequence[Row], at: str, key: str) -> tuple[list[float], list[float]]:
    """x and y of the rows that have both, the last row of each x, in order."""
    found = {number(row[at]): number(row[key]) for row in rows if key in row and at in row}
    kept = sorted((x, y) for x, y in found.items() if math.isfinite(x) and math.isfinite(y))
    return [x for x, _ in kept], [y for _, y in kept]
