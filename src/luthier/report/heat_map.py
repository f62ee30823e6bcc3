"""A text as one page whose tokens are colored by their bits, on a scale that is the same for every text.

The page needs no network and reads without its script: each token has a tooltip of its own then.
"""

from __future__ import annotations

import codecs
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from luthier.core.errors import DataError
from luthier.core.files import atomic_write
from luthier.report.axes import Line
from luthier.report.curves import thin
from luthier.report.figures import curve
from luthier.report.html import page

MOST_TOKENS = 60_000
"""Tokens on one page: more of them make a browser slow."""
STEPS = 33  # colors, one for each half bit from 0 to 16
# ColorBrewer's YlGnBu on light pages, cividis on dark ones: both order by lightness, so that no kind of color blindness
# mixes them up, and both leave a cheap token near the color of its page.
LIGHT = ["#fffefb", "#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58"]
DARK = [
    "#171614",
    "#00224e",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
]
CONTROL = {"\n": "↵", "\t": "⇥", "\r": "CR"}
SETTLED = 32  # bytes after which the running mean is worth drawing


@dataclass(frozen=True, kw_only=True)
class HeatToken:
    """One token as the page shows it."""

    data: bytes
    """What it stands for; nothing for the end of a text."""
    bits: float
    """The number that colors it."""
    surprisal: float
    """-log2 p of the token that came."""
    entropy: float
    """Bits that the model expected to pay."""
    rank: int
    """1 for the token that the model thought most probable."""
    top: Sequence[tuple[bytes, float]]
    """The most probable tokens with their probabilities."""
    begins: bool = False
    """A new context begins here."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A text to show, with the words that belong to its numbers."""

    title: str
    """What the text is."""
    model: str
    """By which model."""
    tokens: Sequence[HeatToken]
    """In order."""
    label: str
    """Name of the number that colors the tokens."""
    what: str
    """What that number is."""
    is_not: str
    """What it is not."""
    facts: Sequence[tuple[str, str]] = ()
    """Further figures for the head of the page: (name, value)."""
    notes: Sequence[str] = ()
    """Sentences below the text."""
    unit: str = "bits"
    """Of the colored number."""
    top: float = 16.0
    """The end of the scale: what lies beyond has its last color."""
    curve: bool = True
    """Whether the numbers sum to a code length, whose bits per byte are drawn."""


def write_heat_map(heat: HeatMap, path: Path) -> Path:
    """Write the page; returns its path. Raises: DataError for more tokens than a browser can show."""
    atomic_write(path, render_heat_map(heat))
    return path


def render_heat_map(heat: HeatMap) -> str:
    """The page as HTML text; the same for the same tokens. Raises: DataError for none, or too many."""
    if not 1 <= len(heat.tokens) <= MOST_TOKENS:
        raise DataError(
            f"{heat.title}: {len(heat.tokens):,} tokens, expected 1 to {MOST_TOKENS:,} on a page",
            hint="show a part of the text with --max-bytes",
        )
    parts = resources.files("luthier.report")
    style, script = (parts.joinpath(f"heat_map.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in heat.notes)
    content = (
        f"<header><h1>{html.escape(heat.title)}</h1><p class='meta'><span>{html.escape(heat.model)}</span>"
        f"<span>{html.escape(heat.label)}</span></p></header>"
        f'<section><dl class="headline">{_headline(heat)}</dl></section>'
        f"{_curve(heat)}<section>{_legend(heat)}<p class='heat' tabindex='0' "
        f"aria-label='text, colored by {html.escape(heat.label)}'>{_spans(heat)}</p></section>"
        f"<section class='note'>{notes}</section>"
        "<div class='tip' role='tooltip' hidden></div>"
    )
    return page(heat.title, content, style=style + _colors(), script=script)


def _headline(heat: HeatMap) -> str:
    size, count = sum(len(token.data) for token in heat.tokens), len(heat.tokens)
    facts = [("tokens", f"{count:,}"), ("bytes", f"{size:,}")]
    if heat.curve and size:
        facts.insert(0, ("bits per byte", f"{sum(token.bits for token in heat.tokens) / size:.3f}"))
    facts += [
        ("mean surprisal, bits", f"{sum(token.surprisal for token in heat.tokens) / count:.3f}"),
        ("mean predictive entropy, bits", f"{sum(token.entropy for token in heat.tokens) / count:.3f}"),
        ("first choice was right", f"{100 * sum(token.rank == 1 for token in heat.tokens) / count:.1f} %"),
        *heat.facts,
    ]
    return "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)


def _legend(heat: HeatMap) -> str:
    swatches = "".join(f'<i class="h{step}"></i>' for step in range(STEPS))
    ticks = "".join(f"<span>{heat.top * quarter / 4:g}{'+' * (quarter == 4)}</span>" for quarter in range(5))
    words = f"{heat.label}, {heat.unit}: {heat.what}; {heat.is_not}."
    return (
        f'<div class="legend"><div class="scale" aria-hidden="true">{swatches}</div>'
        f'<div class="ticks">{ticks}</div><p>{html.escape(words)} '
        f"<span class='why'>Point at a token, or use the arrow keys.</span></p></div>"
    )


def _spans(heat: HeatMap) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return "".join(_span(token, heat, decoder) for token in heat.tokens)


def _span(token: HeatToken, heat: HeatMap, decoder: codecs.IncrementalDecoder) -> str:
    classes = [f"h{_step(token.bits, heat.top)}"]
    classes += ["begins"] if token.begins else []
    classes += ["below"] if token.bits < 0 else []
    title = html.escape("\n".join(_tooltip(token, heat)), quote=True).replace("\n", "&#10;")
    return f'<span class="{" ".join(classes)}" title="{title}">{_visible(token.data, decoder)}</span>'


def _step(bits: float, top: float) -> int:
    """The color of a number: its place on the scale, rounded; the last color from `top` on, also for infinity."""
    if not bits > 0:
        return 0
    return STEPS - 1 if bits >= top else round(bits / top * (STEPS - 1))


def _tooltip(token: HeatToken, heat: HeatMap) -> list[str]:
    lines = [_quoted(token.data), _hexadecimal(token.data)]
    if heat.unit != "bits" or abs(token.bits - token.surprisal) > 5e-3:
        lines.append(f"{heat.label}: {token.bits:.2f} {heat.unit}")
    lines += [
        f"surprisal: {token.surprisal:.2f} bits",
        f"predictive entropy: {token.entropy:.2f} bits",
        f"rank: {token.rank:,}",
    ]
    return lines + [f"{100 * p:5.1f} % {_quoted(data)}" for data, p in token.top]


def _quoted(data: bytes) -> str:
    """A token in quotes, on one line; what is no text as \\x..."""
    if not data:
        return "end of text"
    text = data.decode("utf-8", "backslashreplace")
    return "“" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "”"


def _hexadecimal(data: bytes) -> str:
    shown = data[:12].hex(" ") + (" …" if len(data) > 12 else "")
    return f"{len(data)} byte{'s' * (len(data) != 1)}: {shown}" if data else "0 bytes"


def _visible(data: bytes, decoder: codecs.IncrementalDecoder) -> str:
    """A token as it stands in the text. Bytes of an unfinished character are shown as such; the last has it."""
    if not data:
        return "<b>■</b>\n"
    text = decoder.decode(data)
    if not text:
        return f"<b>{data.hex()}</b>"
    parts = []
    for character in text:
        if character in CONTROL:
            parts.append(f"<b>{CONTROL[character]}</b>" + ("\n" if character == "\n" else ""))
        elif character.isprintable() or character == "\u00a0":
            parts.append(html.escape(character))
        else:
            parts.append(f"<b>{character.encode().hex()}</b>")
    return "".join(parts)


def _curve(heat: HeatMap) -> str:
    if not heat.curve:
        return ""
    x, y, bits, size = list[float](), list[float](), 0.0, 0
    settled = min(SETTLED, sum(len(token.data) for token in heat.tokens))
    for token in heat.tokens:
        bits, size = bits + token.bits, size + len(token.data)
        if size >= settled:
            x.append(float(size))
            y.append(bits / size if math.isfinite(bits) and size else math.nan)
    x, y = thin(x, y)
    picture = curve(
        [Line(x=x, y=y, label="running mean", color=0, dots=len(x) < 2)],
        name="running",
        unit="bits/byte",
        x_label="bytes",
        description=f"running mean of bits per byte, {y[-1]:.3f} at the end",
    )
    caption = "Bits per byte of the text so far"
    return f'<section class="grid"><figure><figcaption>{caption}</figcaption>{picture}</figure></section>'


def _colors() -> str:
    """CSS of both scales. Text on a color is black or white, whichever differs more: at least 4.5 to 1."""
    light, dark = (
        "".join(
            f".h{step}{{background:{color};color:{text_color(color)}}}\n" for step, color in enumerate(scale(stops))
        )
        for stops in (LIGHT, DARK)
    )
    return f"{light}@media screen and (prefers-color-scheme: dark) {{\n{dark}}}\n"


def scale(stops: Sequence[str], steps: int = STEPS) -> list[str]:
    """`steps` colors from the first stop to the last, straight between neighbours."""
    rgb = [_rgb(stop) for stop in stops]
    found = []
    for step in range(steps):
        place = step / (steps - 1) * (len(rgb) - 1)
        left = min(int(place), len(rgb) - 2)
        mixed = (round(a + (place - left) * (b - a)) for a, b in zip(rgb[left], rgb[left + 1], strict=True))
        found.append("#" + "".join(f"{part:02x}" for part in mixed))
    return found


def text_color(background: str) -> str:
    """Black or white, whichever stands out more."""
    return max("#000000", "#ffffff", key=lambda color: contrast(color, background))


def contrast(a: str, b: str) -> float:
    """Contrast of two colors, 1 to 21 (WCAG 2)."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    parts = (part / 255 for part in _rgb(color))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
