"""When each call of a problem ran, as a drawing: one band for each role, calls at the same time below each other."""

from __future__ import annotations

import html

from luthier.report.spans import ProblemTrace, Span
from luthier.report.svg import PALETTE_SIZE

WIDTH, LEFT, RIGHT = 900, 92, 8
LANE, GAP, BETWEEN, AXIS = 7, 2, 8, 22
TICKS = 5


def waterfall(problem: ProblemTrace) -> str:
    """The drawing as SVG, '' without calls."""
    calls = problem.calls
    if not calls:
        return ""
    total = max(problem.last, 1e-6)
    parts, top = [], 4
    for number, role in enumerate(dict.fromkeys(call.name for call in calls)):
        lanes = _lanes([call for call in calls if call.name == role], total)
        height = len(lanes) * (LANE + GAP)
        label = f'<text x="{LEFT - 10}" y="{top + height / 2 + 4:.0f}" text-anchor="end">{html.escape(role)}</text>'
        bars = [
            _bar(call, top + row * (LANE + GAP), total, 1 + number % PALETTE_SIZE)
            for row, lane in enumerate(lanes)
            for call in lane
        ]
        parts.append(label + "".join(bars))
        top += height + BETWEEN
    height = top + AXIS
    label = f"{len(calls)} calls over {total:.2f} seconds"
    return (
        f'<svg class="waterfall" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"{_axis(total, top)}{''.join(parts)}</svg>"
    )


def _lanes(calls: list[Span], total: float) -> list[list[Span]]:
    """Calls in as few rows as possible, none over another."""
    lanes: list[list[Span]] = []
    for call in sorted(calls, key=lambda call: call.start):
        free = next((lane for lane in lanes if (lane[-1].end or total) <= call.start), None)
        if free is None:
            lanes.append([call])
        else:
            free.append(call)
    return lanes


def _x(seconds: float, total: float) -> float:
    return LEFT + seconds / total * (WIDTH - LEFT - RIGHT)


def _bar(call: Span, y: float, total: float, color: int) -> str:
    start, end = _x(call.start, total), _x(call.end or total, total)
    took = "no answer" if call.end is None else f"{call.end - call.start:.3f} s"
    shape = f'x="{start:.1f}" y="{y:.0f}" width="{max(end - start, 1.5):.1f}" height="{LANE}" rx="1.5"'
    failed = ' class="failed"' if call.error else ""
    title = html.escape(f"{call.name}: {took} {call.error}".strip())
    return f'<rect {shape} fill="var(--line-{color})"{failed}><title>{title}</title></rect>'


def _axis(total: float, bottom: float) -> str:
    ticks = []
    for tick in range(TICKS + 1):
        seconds = total * tick / TICKS
        x, anchor = _x(seconds, total), "end" if tick == TICKS else "middle"
        unit = " s" if tick == TICKS else ""
        ticks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{seconds:.3g}{unit}</text>'
        )
    return "".join(ticks)
