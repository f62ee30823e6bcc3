"""Rows to SVG text: pure functions on metric rows; matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from luthier.report import axes as parts
from luthier.report.axes import BOTTOM, HEIGHT, LEFT, LOW_HEIGHT, RIGHT, TEXT, TOP, WIDTH, Line
from luthier.report.curves import Row, points, smooth, smoothing_window, thin, x_axis
from luthier.report.svg import inline_svg


def curve(
    lines: Sequence[Line],
    *,
    name: str,
    description: str,
    unit: str = "",
    x_label: str = "",
    height: int = HEIGHT,
    scale: str = "linear",
) -> str:
    """An SVG with the lines labelled at their right ends.

    `name` must be unique on the page and a valid id; `unit` stands over the y axis. A line's `best` ('min' or 'max')
    rings and labels that point; its `band` is (low, high), drawn behind it. `scale` is 'linear', 'zero' (linear from
    zero) or 'log' (where the values span a factor that needs it).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    margin = RIGHT + max((0.56 * TEXT * len(line.label) + 4 for line in lines if line.label), default=0)
    box = (LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + margin) / WIDTH, 1 - (TOP + BOTTOM) / height)
    axes = figure.add_axes(box, facecolor="none")
    for line in lines:
        parts.draw_line(axes, line)
    if scale == "log" and not parts.needs_log(lines):
        scale = "linear"
    parts.dress(axes, f"{unit}, log scale" if scale == "log" else unit, x_label)
    parts.scale_x(axes, [x for line in lines for x in line.x])
    parts.scale_y(axes, scale, ticks=5 if height >= HEIGHT else 4)
    for line in lines:
        if line.best:
            parts.ring_best(axes, line)
    parts.label_ends(axes, lines)
    return inline_svg(figure, name=name, description=description)


def loss(train: Sequence[Row], held_out: Sequence[Row], *, name: str) -> str:
    """Training loss, raw and smoothed, and held-out loss, in nats per token."""
    axis = x_axis([*train, *held_out])
    lines = _raw_and_smooth(train, "loss", axis, "train")
    if any("loss" in row for row in held_out):
        x, y = points(held_out, "loss", axis)
        lines.append(Line(x=x, y=y, label="held-out", color=1, dots=True))
    text = f"loss in nats per token over {axis}"
    return curve(lines, name=name, unit="nats/token", x_label=axis, description=text, scale="log")


def bits_per_byte(held_out: Sequence[Row], *, name: str) -> str:
    """Held-out bits per byte with its interval as a band, where the rows have `low` and `high`."""
    axis = x_axis(held_out)
    x, y = points(held_out, "bits_per_byte", axis)
    has_band = all("low" in row and "high" in row for row in held_out if "bits_per_byte" in row)
    rows = [row for row in held_out if "bits_per_byte" in row]
    band = (points(rows, "low", axis)[1], points(rows, "high", axis)[1]) if has_band else None
    line = Line(x=x, y=y, label="held-out", color=1, dots=True, band=band, best="min")
    text = f"held-out bits per byte over {axis}"
    return curve([line], name=name, unit="bits/byte", x_label=axis, description=text)


def measurement(
    rows: Sequence[Row], key: str, *, name: str, unit: str = "", noisy: bool = False, scale: str = "linear"
) -> str:
    """One measured key over the run, as a low panel; a noisy one is drawn faint with its moving average."""
    axis = x_axis(rows)
    if noisy:
        lines = _raw_and_smooth(rows, key, axis)
    else:
        x, y = thin(*points(rows, key, axis))
        lines = [Line(x=x, y=y, dots=len(x) <= 40)]
    text = f"{key} over {axis}"
    return curve(lines, name=name, unit=unit, x_label=axis, height=LOW_HEIGHT, description=text, scale=scale)


def overlay(
    runs: Iterable[tuple[str, Sequence[Row]]],
    key: str,
    *,
    name: str,
    unit: str,
    smoothed: bool = False,
    scale: str = "linear",
) -> str:
    """The same key of several runs, each labelled with its name."""
    named = [(label, rows) for label, rows in runs if any(key in row for row in rows)]
    axis = x_axis([row for _, rows in named for row in rows])
    lines = []
    for number, (label, rows) in enumerate(named):
        x, y = points(rows, key, axis)
        x, y = thin(x, smooth(y, smoothing_window(len(y))) if smoothed else y)
        lines.append(
            Line(x=x, y=y, label=label if len(label) <= 16 else label[:15] + "…", color=number, dots=not smoothed)
        )
    return curve(
        lines, name=name, unit=unit, x_label=axis, description=f"{key} over {axis}, {len(lines)} runs", scale=scale
    )


def _raw_and_smooth(rows: Sequence[Row], key: str, axis: str, label: str = "") -> list[Line]:
    x, y = points(rows, key, axis)
    window = smoothing_window(len(y))
    if not y:
        return []
    raw_x, raw_y = thin(x, y)
    if window == 1:
        return [Line(x=raw_x, y=raw_y, label=label)]
    smooth_x, smooth_y = thin(x, smooth(y, window))
    return [Line(x=raw_x, y=raw_y, faint=True), Line(x=smooth_x, y=smooth_y, label=label)]
