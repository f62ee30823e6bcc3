"""Values to text, and text to HTML tables; everything that leaves this module as HTML is escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"))
NUMERIC = re.compile(
    r"[-+−±~≈<>≤≥]?\s?[$€]?\.?\d[\d,.\s]*(e[-+]?\d+)?\s?(%|[kMBTG]i?B?|x|×|s|ms|min|h)?(\s?[\[(±/].*)?", re.IGNORECASE
)
EMPTY = "–"


def compact(value: float) -> str:
    """Four significant digits, large values with a suffix: 1250000 -> '1.25M', 0.0003 -> '0.0003'."""
    for size, suffix in SUFFIXES:
        if abs(value) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.4g}{suffix}"
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def cell(value: object) -> str:
    """A value as plain text: four significant digits for floats, thousands separators for integers, a dash for None."""
    if value is None or value == "":
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or EMPTY
    return str(value)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def column(values: Sequence[object]) -> list[str]:
    """The cells of a column; its floats with equally many decimals, where four or fewer are enough."""
    texts = [cell(value) for value in values]
    floats = [text for value, text in zip(values, texts, strict=True) if isinstance(value, float)]
    decimals = max((len(text.partition(".")[2]) for text in floats), default=0)
    if decimals > 4 or any(not text.replace(",", "").replace(".", "").lstrip("-").isdigit() for text in floats):
        return texts
    return [
        f"{value:,.{decimals}f}" if isinstance(value, float) else text
        for value, text in zip(values, texts, strict=True)
    ]


def is_numeric(values: Iterable[str]) -> bool:
    """Whether a column reads as numbers (with units or intervals), so that it is set flush right."""
    filled = [value for value in values if value not in (EMPTY, "—")]
    return bool(filled) and all(NUMERIC.fullmatch(value) for value in filled)


def table(columns: Sequence[object], rows: Sequence[Sequence[object]], *, title: str = "", note: str = "") -> str:
    """A table in a box of its own that scrolls sideways on a narrow screen; numeric columns are flush right."""
    if not rows:
        return f'<p class="none">{_sentence(title)}no rows.</p>'
    width = max(len(columns), *map(len, rows))
    heads = [str(name) for name in columns] + [""] * (width - len(columns))
    texts = [column([row[i] if i < len(row) else None for row in rows]) for i in range(width)]
    marks = [_mark(cells) for cells in texts]
    head = "".join(f'<th scope="col"{mark}>{html.escape(text)}</th>' for text, mark in zip(heads, marks, strict=True))
    body = "".join(f"<tr>{_cells(row, marks)}</tr>" for row in zip(*texts, strict=True))
    caption = f"<h4>{html.escape(title)}</h4>" if title else ""
    label = html.escape(title or "table")
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{caption}{scroll}{grid}</div>" + (f'<p class="note">{html.escape(note)}</p>' if note else "")


def _mark(texts: Sequence[str]) -> str:
    """The class of a column: 'n' for numbers, 'w' for prose, which may wrap."""
    if is_numeric(texts):
        return ' class="n"'
    return ' class="w"' if any(len(text) > 40 for text in texts) else ""


def _cells(row: Sequence[str], marks: Sequence[str]) -> str:
    return "".join(f"<td{mark}>{html.escape(text)}</td>" for text, mark in zip(row, marks, strict=True))


def _sentence(title: str) -> str:
    return f"{html.escape(title)}: " if title else ""


def flatten(mapping: Mapping[Any, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one level with dotted keys: {'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, object] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
