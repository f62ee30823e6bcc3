"""The parts of a figure: lines, axes without junk, labels at line ends, the best value. Used by `figures.curve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.report.svg import INK, MUTED, PAGE, PALETTE, RULE
from luthier.report.tables import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One figure is about as wide as a phone, so that its text stays legible there; on a desktop two stand side by side.
WIDTH, HEIGHT, LOW_HEIGHT = 360, 216, 150  # points
TEXT = 10  # points
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 32  # margins, points
LABEL_GAP = 13  # smallest distance between two labels at line ends, points


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: `x` and `y` of equal length (NaN leaves a gap), and how it is drawn."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    color: int = 0
    faint: bool = False
    dots: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    best: str = ""


def draw_line(axes: Axes, line: Line) -> None:
    """One curve, with its band behind it."""
    color, lonely = PALETTE[line.color % len(PALETTE)], sum(map(math.isfinite, line.y)) < 2
    if line.band:
        axes.fill_between(line.x, *line.band, color=color, alpha=0.18, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        color=color,
        alpha=0.28 if line.faint else 1,
        linewidth=0.8 if line.faint else 1.6,
        linestyle="--" if line.color >= len(PALETTE) else "-",
        marker="o" if line.dots or lonely else "",
        markersize=3.2,
        solid_capstyle="round",
        zorder=2 if line.faint else 3,
    )


def dress(axes: Axes, unit: str, x_label: str) -> None:
    """Take away frame and tick marks; leave hairlines, and the unit over the y axis."""
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=TEXT, length=0, pad=5)
    figure = axes.figure
    top = axes.get_position().y1 * figure.bbox.height + TOP * figure.dpi / 72
    figure.text(4 / WIDTH, (top - 5) / figure.bbox.height, unit, color=MUTED, size=TEXT, va="top")
    figure.text(axes.get_position().x1, 0.01, x_label, color=MUTED, size=TEXT, va="bottom", ha="right")


def needs_log(lines: Sequence[Line]) -> bool:
    """Whether all values are positive and span a factor at which a linear axis flattens the end of a curve."""
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 2.5


def scale_x(axes: Axes, x: Sequence[float]) -> None:
    """The x axis: from zero to the last value."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    start, end = min([0, *x]), max([1, *x])
    margin = 0.015 * (end - start)  # so that a dot at the end is whole, or at zero
    axes.set_xlim(start - margin if start in x else start, end + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def scale_y(axes: Axes, scale: str, *, ticks: int) -> None:
    """The y axis: 'linear', 'zero' or 'log'."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.margins(y=0.08)
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_log_ticks(axes.dataLim.y1 / axes.dataLim.y0)))
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if scale == "zero":
        axes.set_ylim(bottom=min(0, axes.dataLim.y0))


def _log_ticks(ratio: float) -> tuple[float, ...]:
    """Leading digits that get a tick: fewer the more decades there are."""
    return (1, 1.5, 2, 3, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1,)


def label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each label beside its line's last finite point, moved apart where two would overlap."""
    ends = []
    axes.autoscale_view()
    for line in lines:
        finite = [y for y in line.y if math.isfinite(y)]
        if line.label and finite:
            ends.append((_to_points(axes, finite[-1]), line))
    ends.sort(key=lambda end: end[0])
    right = axes.get_position().x1 * WIDTH
    heights = spread([height for height, _ in ends], LABEL_GAP)
    for i, (height, (_, line)) in enumerate(zip(heights, ends, strict=True)):
        height = max(height, BOTTOM + 3 + i * LABEL_GAP)  # clear of the tick labels
        color = PALETTE[line.color % len(PALETTE)]
        x, y = (right + 6) / WIDTH, height * axes.figure.dpi / 72 / axes.figure.bbox.height
        axes.figure.text(x, y, line.label, color=color, size=TEXT, va="center_baseline")


def _to_points(axes: Axes, y: float) -> float:
    return float(axes.transData.transform((0, y))[1]) * 72 / axes.figure.dpi


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed so that neighbours are at least `gap` apart."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _spaced(groups[-1], gap)[0] - _spaced(groups[-2], gap)[-1] < gap - 1e-9:
            last = groups.pop()
            groups[-1] += last
    return [height for group in groups for height in _spaced(group, gap)]


def _spaced(group: Sequence[float], gap: float) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + (i - (len(group) - 1) / 2) * gap for i in range(len(group))]


def ring_best(axes: Axes, line: Line) -> None:
    """Ring and label the lowest or highest value of a line, and make room for the text."""
    finite = [i for i, y in enumerate(line.y) if math.isfinite(y)]
    if len(finite) < 2:
        return
    index = (min if line.best == "min" else max)(finite, key=line.y.__getitem__)
    x, y, color = line.x[index], line.y[index], PALETTE[line.color % len(PALETTE)]
    axes.plot([x], [y], "o", markersize=6.5, markerfacecolor=PAGE, markeredgecolor=color, markeredgewidth=1.6, zorder=4)
    left_half = x < sum(axes.get_xlim()) / 2
    below = line.best == "min"
    axes.annotate(
        f"best {y:.4g}",
        (x, y),
        xytext=(0, -10 if below else 10),
        textcoords="offset points",
        color=INK,
        size=TEXT,
        weight="bold",
        ha="left" if left_half else "right",
        va="top" if below else "bottom",
        annotation_clip=False,
    )
    (low, high), stretch = axes.get_ylim(), 0.12  # room for the text
    if axes.get_yscale() == "log":
        axes.set_ylim(low / (high / low) ** (stretch * below), high * (high / low) ** (stretch * (not below)))
    else:
        axes.set_ylim(low - stretch * (high - low) * below, high + stretch * (high - low) * (not below))
