"""When each call of a problem ran, as a drawing: one band for each role, calls at the same time below each other."""

from __future__ import annotations

import html
import math

from luthier.report.spans import ProblemTrace, Span
from luthier.report.svg import PALETTE_SIZE

WIDTH, LEFT, RIGHT = 900, 92, 8
LANE, GAP, BETWEEN, AXIS, HEAD = 7, 2, 8, 22, 16
TICKS = 6
COLORS = {"solve": 1, "decompose": 2, "step": 3, "judge": 4, "refine": 5, "plan": 6}  # the same in every drawing
ROOM = 56  # between two labels of rounds


def waterfall(problem: ProblemTrace, anchor: str = "") -> str:
    """The drawing as SVG, '' without calls. Bars lead to the ids `anchor`-1, `anchor`-2, ... of the calls in order."""
    calls = problem.calls
    if not calls:
        return ""
    total = max(problem.last, 1e-6)
    number_of = {call.number: number for number, call in enumerate(calls, 1)}
    parts, top = [], HEAD
    for role in dict.fromkeys(call.name for call in calls):
        color = COLORS.get(role, PALETTE_SIZE)
        lanes = _lanes([call for call in calls if call.name == role], total)
        height = len(lanes) * (LANE + GAP)
        label = (
            f'<text x="{LEFT - 10}" y="{top + height / 2 + 3:.0f}" text-anchor="end">{html.escape(role[:14])}</text>'
        )
        bars = [
            _bar(call, top + row * (LANE + GAP), total, color, f"{anchor}-{number_of[call.number]}")
            for row, lane in enumerate(lanes)
            for call in lane
        ]
        parts.append(label + "".join(bars))
        top += height + BETWEEN
    label = f"{len(calls)} calls over {total:.2f} seconds"
    return (
        f'<svg class="waterfall" viewBox="0 0 {WIDTH} {top + AXIS}" role="img" aria-label="{label}">'
        f"{_axis(total, top)}{_rounds(problem, total, top)}{''.join(parts)}</svg>"
    )


def _lanes(calls: list[Span], total: float) -> list[list[Span]]:
    """Calls in as few rows as possible, none over another."""
    lanes: list[list[Span]] = []
    for call in sorted(calls, key=lambda call: call.start):
        free = next((lane for lane in lanes if _end(lane[-1], total) <= call.start), None)
        if free is None:
            lanes.append([call])
        else:
            free.append(call)
    return lanes


def _end(call: Span, total: float) -> float:
    return total if call.end is None else call.end


def _x(seconds: float, total: float) -> float:
    return LEFT + seconds / total * (WIDTH - LEFT - RIGHT)


def _bar(call: Span, y: float, total: float, color: int, target: str) -> str:
    start, end = _x(call.start, total), _x(_end(call, total), total)
    took = "no reply" if call.end is None else f"{call.end - call.start:.3f} s"
    shape = f'x="{start:.1f}" y="{y:.0f}" width="{max(end - start - 1, 1.5):.1f}" height="{LANE}" rx="1.5"'
    failed = ' class="failed"' if call.error or call.end is None else ""  # hollow, not only of another color
    title = html.escape(f"{call.name}: {took} {call.error}".strip())
    bar = f'<rect {shape} style="--role:var(--line-{color})"{failed}><title>{title}</title></rect>'
    return f'<a href="#{target}" tabindex="-1">{bar}</a>'


def _rounds(problem: ProblemTrace, total: float, bottom: float) -> str:
    """Where rounds begin; labels that would touch are left out."""
    parts, free = [], 0.0
    for span in problem.rounds:
        x = _x(span.start, total)
        label = span.name if span.name != "round" else f"round {span.data.get('number', '')}"
        parts.append(f'<line class="round" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        if x >= free and x < WIDTH - ROOM:
            parts.append(f'<text x="{x + 4:.1f}" y="10">{html.escape(label[:12])}</text>')
            free = x + ROOM
    return "".join(parts)


def tick_step(total: float) -> float:
    """1, 2 or 5 times a power of ten, so that about six ticks fit."""
    rough = total / TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)


def _axis(total: float, bottom: float) -> str:
    step = tick_step(total)
    ticks = []
    for tick in range(int(total / step * 1.0001) + 1):
        x = _x(tick * step, total)
        anchor = "end" if x > WIDTH - 20 else "middle"
        ticks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" y2="{bottom}"/>'
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{tick * step:.6g}{"" if tick else " s"}</text>'
        )
    return "".join(ticks)
