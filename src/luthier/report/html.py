"""The page: `render` a folder to one HTML text that needs nothing else, `write_report` to put it on disk."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from luthier.core.files import atomic_write
from luthier.report.compare import comparison, headlines
from luthier.report.record import Record, is_run, layout, read, runs, stages
from luthier.report.sections import OVERVIEW_FIRST, OVERVIEW_LAST, SECTIONS, body


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, a recipe or a folder of runs; returns its path (`out`, or report.html in the folder).

    Raises DataError when the folder holds no run.
    """
    path = Path(out) if out is not None else Path(folder) / "report.html"
    atomic_write(path, render(Path(folder)))
    return path


def render(folder: Path) -> str:
    """The report as HTML text; the same for the same folder. DataError when it holds no run."""
    pages = {"run": _run_page, "recipe": _recipe_page, "comparison": _comparison_page}
    return pages[layout(folder)](folder)


def _run_page(folder: Path) -> str:
    record = read(folder)
    return page(record.title, f"{_heading(record, record.title)}{body(record, SECTIONS)}")


def _recipe_page(folder: Path) -> str:
    """Overview first, then each stage; what the parent folder holds of its own belongs to the overview."""
    parts = [read(path) for path in stages(folder)]
    name = folder.resolve().name
    title = f"{name} · recipe of {len(parts)} {'stage' if len(parts) == 1 else 'stages'}"
    table = f"<section><h2>Stages</h2>{headlines(parts)}</section>"
    if is_run(folder):
        parent = read(folder)
        parent = replace(parent, status=recipe_status(parent, parts))
        top, first, last = _heading(parent, title), body(parent, OVERVIEW_FIRST), body(parent, OVERVIEW_LAST)
    else:
        top, first, last = _title("Recipe", title, parts), "", ""
    return page(title, f"{top}{_contents(parts)}{first}{table}{last}{''.join(map(_stage, parts))}")


def recipe_status(parent: Record, parts: Sequence[Record]) -> str:
    """How far a recipe came: its own state, and the stage where it stands."""
    if parent.state == "finished":
        return parent.status
    open_stages = [part for part in parts if part.state != "finished"]
    where = f"in {open_stages[0].name}" if open_stages else f"after {parts[-1].name}"
    return f"{parent.state} {where}"


def _comparison_page(folder: Path) -> str:
    records = [read(path) for path in runs(folder)]
    title = f"{folder.resolve().name} · {len(records)} runs"
    return page(title, f"{_title('Comparison', title, records)}{comparison(records)}")


def _heading(record: Record, title: str) -> str:
    status = f'<span class="status {record.state}">{html.escape(record.status)}</span>'
    where = f"<span>{html.escape(record.name)}</span><span>{html.escape(record.date)}</span>"
    return f'<header><h1>{html.escape(title)}</h1><p class="meta">{status}{where}</p></header>'


def _title(kind: str, title: str, records: Sequence[Record]) -> str:
    latest = max(record.date for record in records)
    meta = f'<p class="meta"><span>{kind}</span><span>{html.escape(latest)}</span></p>'
    return f"<header><h1>{html.escape(title)}</h1>{meta}</header>"


def _contents(records: Sequence[Record]) -> str:
    links = "".join(f'<li><a href="#{r.anchor}">{html.escape(r.name)}</a></li>' for r in records)
    return f'<nav aria-label="Stages"><ol>{links}</ol></nav>'


def _stage(record: Record) -> str:
    status = f'<span class="status {record.state}">{html.escape(record.status)}</span>'
    meta = f'<p class="meta">{status}<span>{html.escape(record.date)}</span></p>'
    heading = f"<h2>{html.escape(record.name)}</h2>{meta}"
    return f'<article id="{record.anchor}">{heading}{body(record, SECTIONS, level=3)}</article>'


def page(title: str, content: str, *, style: str = "", script: str = "") -> str:
    """A whole HTML document around `content`, with the style sheet inside, more of it in `style`, and a script.

    With a script, the browser is told to run that one and no other, and to load nothing.
    """
    common = resources.files("luthier.report").joinpath("style.css").read_text(encoding="utf-8")
    ending = f"<script>\n{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{_policy(script) if script else ''}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)} · luthier</title>\n<style>\n{common}{style}</style>\n</head>\n"
        f"<body>\n<main>{content}</main>\n{ending}</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'
