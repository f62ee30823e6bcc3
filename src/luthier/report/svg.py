"""Matplotlib's SVG made part of a page: colors that follow the theme, ids that do not clash, nothing unseen."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Matplotlib wants real colors. Each of these stands for a variable of style.css: one drawing serves light and dark.
PALETTE_SIZE = 8
INK, MUTED, RULE, PAGE = "#010101", "#010102", "#010103", "#010104"
PALETTE = tuple(f"#0102{number:02x}" for number in range(1, PALETTE_SIZE + 1))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAGE: "var(--page)",
    **{color: f"var(--line-{number})" for number, color in enumerate(PALETTE, 1)},
}

REMOVED = (
    r"<\?xml.*?\?>",
    r"<!DOCTYPE.*?>",
    r"<!--.*?-->",
    r"<metadata>.*?</metadata>",
    r"<style.*?</style>",  # would apply to the whole page; style.css has it, limited to figures
    r' xmlns(:xlink)?="[^"]*"',  # HTML needs no namespaces
    r' version="1\.1"',
    r"font-family: [^;\"]*;? ?",
    r' transform="rotate\(-0 [^"]*\)"',
)


def inline_svg(figure: Figure, *, name: str, description: str) -> str:
    """A figure as an `<svg>` element; the same figure and name always give the same text.

    `name` prefixes the element's ids and must be unique on the page; `description` is read out in place of the picture.
    """
    text = _draw(figure, name)
    for pattern in REMOVED:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    text = _short_ids(text, name).replace("xlink:href", "href")
    text = re.sub(r"<g>\s*</g>|<defs>\s*</defs>", "", text)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()
    label = html.escape(description)
    return re.sub(
        r'<svg width="[^"]*" height="[^"]*"', f'<svg class="plot" role="img" aria-label="{label}"', text, count=1
    )


def _draw(figure: Figure, name: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text ("none"): it takes the page's font, is selectable and costs a tenth of the outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    return stream.getvalue()


def _short_ids(text: str, name: str) -> str:
    """Drop ids that nothing refers to, and number the others: `name-1`, `name-2`, ..."""
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    short = {identifier: f"{name}-{number}" for number, identifier in enumerate(used, 1)}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", text)
    return re.sub(r'(url\(|href=")#([^)"]+)', lambda m: f"{m[1]}#{short[m[2]]}", text)
