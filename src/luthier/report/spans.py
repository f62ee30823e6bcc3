"""Trace files of reasoning as trees: problems, their rounds, what was asked and what came of it.

A trace file has one JSON object a line: the start and the end of spans (problem, round, stage, step, call), and points
between them. Problems may be mixed. A killed run leaves spans without an end and cuts its last line off; when the run
goes on in the same file, that line is in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError

HINT = "give a file that `luthier solve --trace`, `luthier eval --traces` or `luthier serve --traces` wrote"
LONG = ("messages", "replies", "text", "steps")
HUGE = 1e15
NEEDED: dict[str, dict[str, type]] = {
    "start": {"span": int, "kind": str, "name": str},
    "end": {"span": int},
    "point": {"name": str},
}


@dataclass
class Span:
    """A part of the work. Times are seconds since the trace began; `end` is None for one that was never closed."""

    number: int
    parent: int | None
    kind: str
    name: str
    start: float
    data: dict[str, Any]
    end: float | None = None
    error: str = ""

    def count(self, name: str) -> float:
        """A number in the data; 0 when it is missing or is none."""
        value = self.data.get(name)
        return value if isinstance(value, int | float) and abs(value) < HUGE else 0


@dataclass(frozen=True)
class Point:
    """Something that happened inside a span."""

    parent: int | None
    name: str
    time: float
    data: Mapping[str, Any]


@dataclass
class ProblemTrace:
    """All that is known of one problem; without its texts when it is not `whole`."""

    name: str
    whole: bool = True
    spans: dict[int, Span] = field(default_factory=dict)
    items: list[Span | Point] = field(default_factory=list)
    """Spans and points in the order in which they came."""

    @property
    def top(self) -> Span | None:
        """The span of the whole problem."""
        return next((span for span in self.spans.values() if span.kind == "problem"), None)

    @property
    def calls(self) -> list[Span]:
        """Calls of models, in the order in which they began."""
        return [span for span in self.spans.values() if span.kind == "call"]

    @property
    def rounds(self) -> list[Span]:
        """Rounds, in order."""
        return [span for span in self.spans.values() if span.kind == "round"]

    @property
    def points(self) -> list[Point]:
        """Points, in order."""
        return [item for item in self.items if isinstance(item, Point)]

    @property
    def last(self) -> float:
        """When the last thing happened, in seconds."""
        times = [item.time if isinstance(item, Point) else item.end or item.start for item in self.items]
        return max(times, default=0.0)

    @property
    def outcome(self) -> str:
        """Why it stopped; 'failed' after an error, 'unfinished' when it has no end."""
        if self.top is None or self.top.end is None:
            return "unfinished"
        return "failed" if self.top.error else str(self.top.data.get("stop") or "done")

    def round_of(self, number: int | None) -> int | None:
        """The round that a span belongs to; None outside of all rounds."""
        seen: set[int] = set()
        while number is not None and number in self.spans and number not in seen:
            if self.spans[number].kind == "round":
                return number
            seen.add(number)
            number = self.spans[number].parent
        return None

    def tokens(self) -> tuple[int, int]:
        """Tokens read and written in all calls."""
        names = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
        read, written = (int(sum(call.count(name) for call in self.calls)) for name in names)
        return read, written

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        data = dict(event.get("data") or {})
        if not self.whole:
            data = {name: value for name, value in data.items() if name not in LONG}
        if event["event"] == "start":
            span = Span(event["span"], event.get("parent"), event["kind"], event["name"], event["t"], data)
            self.spans[span.number] = span
            self.items.append(span)
        elif event["event"] == "end" and event["span"] in self.spans:
            span = self.spans[event["span"]]
            span.end, span.error = event["t"], str(event.get("error", ""))
            span.data.update(data)
        elif event["event"] == "point" and self.whole:
            self.items.append(Point(event.get("parent"), event["name"], event["t"], data))


@dataclass
class Traces:
    """The problems of a file, in the order in which they began, and how many of its lines were cut off."""

    problems: list[ProblemTrace] = field(default_factory=list)
    cut: int = 0


def read_traces(path: Path, whole: int | None = None) -> Traces:
    """Read a trace file line by line. A problem that was begun again is there twice.

    Of problems after the first `whole`, only what totals need is kept. Raises: DataError for a file that is no trace.
    """
    traces = Traces()
    current: dict[str, ProblemTrace] = {}
    for event in _events(path):
        if event is None:
            traces.cut += 1
            continue
        name = str(event["trace"])
        begins = event["event"] == "start" and event["kind"] == "problem"
        if begins or name not in current:
            current[name] = ProblemTrace(name, whole=whole is None or len(traces.problems) < whole)
            traces.problems.append(current[name])
        current[name].add(event)
    if not traces.problems:
        raise DataError(f"{path}: it is empty, expected the events of a trace, one JSON object a line", hint=HINT)
    return traces


def _events(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """The events of a file, None for a line that was cut off. The first line must be whole: else it is no trace."""
    first = True
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not (_is_event(event) or (event is None and not first)):
                expected = "expected a JSON object with trace, event (start, end or point) and t"
                raise DataError(f"{path}:{number}: not an event of a trace, {expected}", hint=HINT)
            first = False
            yield event


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or "trace" not in event or not isinstance(event.get("event"), str):
        return False
    needed = NEEDED.get(event["event"])
    time, data = event.get("t", HUGE), event.get("data")
    return (
        needed is not None
        and type(time) in (int, float)
        and abs(time) < HUGE  # neither infinite nor NaN
        and all(isinstance(event.get(name), kind) for name, kind in needed.items())
        and isinstance(event.get("parent"), int | None)
        and (data is None or isinstance(data, dict))
    )
