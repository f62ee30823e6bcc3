"""Figures of quantized models: losses by layer, how an error grows through the layers, how divergence is spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.report import figures
from luthier.report.axes import Line
from luthier.report.curves import Row, number

# Key of the `layer` rows -> label, in the order in which a layer goes through them; methods without stages have the
# second pair.
STAGES = {"loss_rounded": "rounded", "loss_stage1": "stage 1", "loss_fixed": "codes set", "loss_stage2": "stage 2"}
ENDS = {"loss_before": "original", "loss": "quantized"}


def losses_by_layer(rows: Sequence[Row], *, name: str) -> str:
    """The validation loss of each layer after each of its stages; '' without any."""
    keys = STAGES if any("loss_stage1" in row for row in rows) else ENDS
    lines = [
        Line(x=x, y=y, label=label, color=color, dots=True)
        for color, (key, label) in enumerate(keys.items())
        for x, y in [_positive(*_points(rows, "layer", key))]
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
    x, y = _positive(*_points(rows, "percent", "nats"))
    if not x:
        return ""
    line = Line(x=x, y=y, dots=True)
    text = "quantiles of KL(A‖B) over tokens, in nats"
    return figures.curve([line], name=name, unit="nats", x_label="% of tokens", description=text, scale="log")


def _points(rows: Sequence[Row], at: str, key: str) -> tuple[list[float], list[float]]:
    """x and y of the rows that have both, the last row of each x, in order."""
    found = {number(row[at]): number(row[key]) for row in rows if key in row and at in row}
    kept = sorted((x, y) for x, y in found.items() if math.isfinite(x) and math.isfinite(y))
    return [x for x, _ in kept], [y for _, y in kept]


def _positive(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """The points that a logarithmic axis can show."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    return [a for a, _ in kept], [b for _, b in kept]
