"""The live view of `luthier solve`: a table of steps with bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from luthier.core.console import Console

WIDTH = 10  # of a confidence bar, in characters


class LiveView:
    """A trace listener that shows what goes on. Use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._terminal = console.err.isatty()
        self._live: Live | None = None
        self._line = ""
        self._steps: dict[int, dict[str, Any]] = {}
        self._index_of: dict[int, int] = {}

    def __enter__(self) -> LiveView:
        if self._terminal:
            from rich.console import Console as RichConsole

            self._live = Live(console=RichConsole(file=self._console.err), transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "start":
            self._started(event)
        elif event["event"] == "end" and event["span"] in self._index_of:
            self._steps[self._index_of[event["span"]]].update(event["data"])
        elif event["event"] == "point":
            self._noted(event)
        if self._live is not None:
            self._live.update(self._table())

    def _started(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            self._index_of[event["span"]] = event["data"]["index"]
            self._steps[event["data"]["index"]] = dict(event["data"])
        elif event["kind"] == "stage":
            if event["name"] == "decompose":
                self._steps.clear()
            self._line = event["name"]
        elif event["kind"] == "round" and event["data"].get("number"):
            self._say(f"round {event['data']['number']}")

    def _noted(self, event: Mapping[str, Any]) -> None:
        data = event["data"]
        if event["name"] == "proposal":
            self._say(f"  answer: {data['answer']}")
        elif event["name"] == "steps" and not self._terminal:
            for step in data["steps"]:
                self._say(f"  {describe(step)}")
        elif event["name"] == "votes":
            self._say("  votes: " + ", ".join(f"{vote['answer']} ×{vote['count']}" for vote in data["votes"]))
        elif event["name"] == "fallback":
            self._say(f"  {data['what']}: {data['why']}")
        elif event["name"] == "budget":
            self._say(f"  budget spent: {data['spent']}")

    def _say(self, text: str) -> None:
        self._line = text.strip()
        if not self._terminal:
            self._console.status(text)

    def _table(self) -> Table:
        table = Table(box=None, title=Text(self._line, style="dim"), title_justify="left", show_header=False)
        for index in sorted(self._steps):
            step = self._steps[index]
            style = "" if step.get("agrees", True) else "bold red"
            cells = (str(index + 1), bar(step.get("confidence")), step["question"], step["answer"], _hint(step))
            table.add_row(*(Text(str(cell), style=style) for cell in cells))
        return table


def bar(confidence: float | None) -> str:
    """Ten characters for a confidence of 0 to 1; dots while it is unknown."""
    if confidence is None:
        return "·" * WIDTH
    full = round(confidence * WIDTH)
    return "█" * full + "░" * (WIDTH - full)


def describe(step: Mapping[str, Any]) -> str:
    """A checked step in one line."""
    text = f"{step['index'] + 1}. {bar(step['confidence'])} {step['question']} {step['answer']} {_hint(step)}"
    return text.rstrip()


def _hint(step: Mapping[str, Any]) -> str:
    """What a doubted step should be; 'refuted' where a checker knows only that it is wrong."""
    if step.get("agrees", True):
        return ""
    return f"-> {step['majority']}" if step.get("majority") else "refuted" * (step.get("decided_by") == "checker")
