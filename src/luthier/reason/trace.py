"""A record of one problem: a tree of spans (problem, round, stage, step, call) and points, as plain dicts.

Events go to listeners while the work goes on: a file, a terminal, a stream of the proxy. A span is two events, so a
killed run leaves a readable trace. Call spans carry OpenTelemetry's names for generative models.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

Kind = Literal["problem", "round", "stage", "step", "call"]
Listener = Callable[[Mapping[str, Any]], None]


class Span:
    """An open part of a trace; `data` is filled while it is open and written when it ends."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.data: dict[str, Any] = {}


class Trace:
    """The events of one problem. `name` identifies it in a file that holds many."""

    def __init__(self, name: str = "problem", listeners: tuple[Listener, ...] = ()) -> None:
        self.name = name
        self._listeners = listeners
        self._began = time.monotonic()
        self._spans = 0
        # Of the task that runs: concurrent stages each have their own.
        self._current: ContextVar[int | None] = ContextVar("span", default=None)

    @property
    def seconds(self) -> float:
        """Seconds since the trace began."""
        return time.monotonic() - self._began

    @contextlib.contextmanager
    def span(self, kind: Kind, name: str, **data: Any) -> Iterator[Span]:
        """A part of the work; what is opened inside becomes its child. An exception is noted and goes on."""
        self._spans += 1
        span = Span(self._spans)
        if not self._listeners:
            yield span
            return
        start = {"span": span.number, "parent": self._current.get(), "kind": kind, "name": name, "data": data}
        self._emit("start", start)
        token = self._current.set(span.number)
        failure: dict[str, str] = {}
        try:
            yield span
        except BaseException as error:
            failure = {"error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            self._current.reset(token)
            self._emit("end", {"span": span.number, "data": span.data, **failure})

    def point(self, name: str, **data: Any) -> None:
        """Something that happened inside the current span."""
        self._emit("point", {"parent": self._current.get(), "name": name, "data": data})

    def _emit(self, event: str, values: Mapping[str, Any]) -> None:
        if not self._listeners:
            return
        whole = {"trace": self.name, "event": event, "t": round(self.seconds, 6), **values}
        for listener in self._listeners:
            listener(whole)


class TraceFile:
    """A listener that appends every event to a JSON-lines file; several traces may share it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Append one event."""
        self._file.write(json.dumps(event, ensure_ascii=True) + "\n")
        if event["event"] == "end" and event["data"].get("stop") is not None:  # a problem is over
            self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._file.close()
