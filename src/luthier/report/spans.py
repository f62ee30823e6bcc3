"""Trace files of reasoning as trees: problems, their rounds, what was asked and what came of it.

A trace file has one JSON object a line: the start and the end of spans (problem, round, stage, step, call), and points
between them. Problems may be mixed, a killed run leaves spans without an end, and the last line may be cut off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError

HINT = "give a file that `luthier solve --trace`, `luthier eval --traces` or `luthier serve --traces` wrote"


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


@dataclass(frozen=True)
class Point:
    """Something that happened inside a span."""

    parent: int | None
    name: str
    time: float
    data: Mapping[str, Any]


@dataclass
class ProblemTrace:
    """All that is known of one problem."""

    name: str
    spans: dict[int, Span] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

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
    def last(self) -> float:
        """When the last thing happened, in seconds."""
        ends = [span.end or span.start for span in self.spans.values()] + [point.time for point in self.points]
        return max(ends, default=0.0)

    def round_of(self, number: int | None) -> int | None:
        """The round that a span belongs to; None outside of all rounds."""
        while number is not None and number in self.spans:
            if self.spans[number].kind == "round":
                return number
            number = self.spans[number].parent
        return None

    def tokens(self) -> tuple[int, int]:
        """Tokens read and written in all calls."""
        names = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
        read, written = (sum(call.data.get(name, 0) for call in self.calls) for name in names)
        return read, written

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind, time = event["event"], float(event["t"])
        if kind == "start":
            data = dict(event.get("data") or {})
            self.spans[event["span"]] = Span(
                event["span"], event.get("parent"), event["kind"], event["name"], time, data
            )
        elif kind == "end" and event["span"] in self.spans:
            span = self.spans[event["span"]]
            span.end, span.error = time, event.get("error", "")
            span.data.update(event.get("data") or {})
        elif kind == "point":
            self.points.append(Point(event.get("parent"), event["name"], time, event.get("data") or {}))


def read_traces(path: Path) -> list[ProblemTrace]:
    """The problems of a trace file, in the order in which they began. A problem that was begun again is there twice.

    Raises: DataError for a file that is no trace.
    """
    found: list[ProblemTrace] = []
    current: dict[str, ProblemTrace] = {}
    for event in _events(path):
        name = str(event["trace"])
        begins = event["event"] == "start" and event.get("kind") == "problem"
        if begins or name not in current:
            current[name] = ProblemTrace(name)
            found.append(current[name])
        current[name].add(event)
    if not found:
        raise DataError(f"{path}: it is empty, expected the events of a trace", hint=HINT)
    return found


def _events(path: Path) -> Iterator[Mapping[str, Any]]:
    unreadable: int | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if unreadable is not None:  # only the last line may be cut off
                raise DataError(f"{path}:{unreadable}: not an event of a trace", hint=HINT)
            event = _event(line)
            if event is None:
                unreadable = number
            else:
                yield event
    if unreadable == 1:
        raise DataError(f"{path}:1: not an event of a trace", hint=HINT)


def _event(line: str) -> Mapping[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    known = isinstance(event, dict) and {"trace", "event", "t"} <= event.keys()
    needed = {"start": {"span", "kind", "name"}, "end": {"span"}, "point": {"name"}}
    return event if known and needed.get(event["event"], {"?"}) <= event.keys() else None
