"""The terminal: rich on a terminal, plain lines elsewhere, one JSON object with --json.

Results go to standard output; status and progress go to standard error, so that output can be piped.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TextIO


class Advance(Protocol):
    """Reports progress: `advance(3, note="loss 2.1")`."""

    def __call__(self, amount: float = 1, *, note: str = "") -> None: ...


class Console:
    """Where verbs write. `as_json` keeps standard output for one JSON object, written by `result`."""

    def __init__(self, *, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        self.out = out or sys.stdout
        self.err = err or sys.stderr

    def print(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            print(text, file=self.out, flush=True)

    def status(self, text: str) -> None:
        """A line about what is going on."""
        print(text, file=self.err, flush=True)

    def result(self, values: dict[str, Any]) -> None:
        """The machine-readable result; printed only with --json."""
        if self.as_json:
            print(json.dumps(values, ensure_ascii=False), file=self.out, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """A table; cells that look like numbers are right-aligned."""
        if self.as_json:
            return
        cells = [[str(cell) for cell in row] for row in rows]
        right = [all(_numeric(row[i]) for row in cells) and bool(cells) for i in range(len(columns))]
        if self.out.isatty():
            self._rich_table(title, columns, cells, right)
        else:
            self._plain_table(title, columns, cells, right)
        if note:
            self.print(note)

    def _rich_table(self, title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
        from rich import box
        from rich.console import Console as Rich
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column, aligned in zip(columns, right, strict=True):  # in a narrow terminal text breaks, and numbers do not
            table.add_column(column, justify="right" if aligned else "left", overflow="fold", no_wrap=aligned)
        for row in cells:
            table.add_row(*row)
        Rich(file=self.out, markup=False, highlight=False).print(table)

    def _plain_table(self, title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
        widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
        self.print(title)
        for row in [list(columns), *cells]:
            padded = [
                text.rjust(w) if aligned else text.ljust(w) for text, w, aligned in zip(row, widths, right, strict=True)
            ]
            self.print(("  " + "  ".join(padded)).rstrip())

    @contextlib.contextmanager
    def progress(self, total: float, label: str, *, done: float = 0) -> Iterator[Advance]:
        """A progress bar on a terminal; elsewhere a line at most every ten seconds."""
        if self.err.isatty():
            with self._rich_progress(total, label, done) as advance:
                yield advance
        else:
            yield self._plain_progress(total, label, done)

    @contextlib.contextmanager
    def _rich_progress(self, total: float, label: str, done: float) -> Iterator[Advance]:
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Rich(file=self.err, markup=False), transient=True) as bar:
            task = bar.add_task(label, total=total, completed=int(done), note="")
            yield lambda amount=1, *, note="": bar.update(task, advance=amount, note=note)

    def _plain_progress(self, total: float, label: str, done: float) -> Advance:
        state = {"done": done, "shown": time.monotonic()}

        def advance(amount: float = 1, *, note: str = "") -> None:
            state["done"] += amount
            if time.monotonic() - state["shown"] > 10 or state["done"] >= total > state["done"] - amount:
                state["shown"] = time.monotonic()
                self.status(f"{label} {state['done'] / (total or 1):4.0%}  {note}".rstrip())

        return advance


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:2].lstrip("-+")[:1].isdigit() or text in ("", "-", "—")
