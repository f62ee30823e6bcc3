"""The heat map: one fixed scale, everything escaped, legible colors, and alive in a real browser."""

from __future__ import annotations

import html
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError
from luthier.report import heat_map
from luthier.report.heat_map import (
    DARK,
    LIGHT,
    STEPS,
    HeatMap,
    HeatToken,
    contrast,
    render_heat_map,
    scale,
    text_color,
    write_heat_map,
)

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('&amp;')</script>\"' "


class Page(HTMLParser):
    """Reads the page: tags must balance; keeps the text of each token with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, dict[str, str | None]]] = []
        self.links: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "span" and "title" in dict(attrs):
            self.tokens.append(("", dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if any(tag == "span" and "title" in attrs for tag, attrs in self.open):
            text, attrs = self.tokens[-1]
            self.tokens[-1] = (text + data, attrs)


def token(data: bytes, bits: float = 2.0, **settings: Any) -> HeatToken:
    values = {"surprisal": bits, "entropy": 1.0, "rank": 3, "top": [(b"the", 0.5), (data, 0.25)], **settings}
    return HeatToken(data=data, bits=bits, **values)


def heat(*tokens: HeatToken, **settings: Any) -> HeatMap:
    words = {"label": "surprisal estimate", "what": "what it is", "is_not": "what it is not"}
    return HeatMap(**{"title": "text.txt", "model": "a model", "tokens": tokens, **words, **settings})


def test_every_token_is_there_with_its_figures() -> None:
    found = Page(render_heat_map(heat(token(b"The", 1.0), token(b" luthier", 7.25, rank=1200)))).tokens
    assert [text for text, _ in found] == ["The", " luthier"]
    lines = (found[1][1]["title"] or "").split("\n")
    assert lines == [
        "“ luthier”",
        "8 bytes: 20 6c 75 74 68 69 65 72",
        "surprisal: 7.25 bits",
        "predictive entropy: 1.00 bits",
        "rank: 1,200",
        " 50.0 % “the”",
        " 25.0 % “ luthier”",
    ]


def test_the_scale_is_fixed_and_ends_at_sixteen_bits() -> None:
    bits = [-3.0, 0.0, 0.2, 0.5, 8.0, 15.9, 16.0, 40.0, math.inf]
    for others in ([], [token(b"y", 100.0)], [token(b"y", 0.01)]):  # whatever else is on the page
        found = Page(render_heat_map(heat(*(token(b"x", value) for value in bits), *others))).tokens
        classes = [(attrs["class"] or "").split()[0] for _, attrs in found[: len(bits)]]
        assert classes == ["h0", "h0", "h0", "h1", "h16", "h32", "h32", "h32", "h32"]
    assert "below" in (found[0][1]["class"] or "")
    page = render_heat_map(heat(token(b"x")))
    assert re.findall(r"<span>([\d+]+)</span>", page)[:5] == ["0", "4", "8", "12", "16+"]
    relative = render_heat_map(heat(token(b"x", 0.5), unit="relative", top=1.0, curve=False))
    assert "bits per byte" not in relative
    assert 'class="h16"' in relative


def test_nothing_in_a_text_can_become_markup() -> None:
    tokens = [token(HOSTILE.encode(), top=[(HOSTILE.encode(), 1.0)])]
    page = render_heat_map(heat(*tokens, title=HOSTILE, model=HOSTILE, label=HOSTILE, notes=[HOSTILE]))
    found = Page(page)
    assert found.scripts == 1  # ours
    assert found.tokens[0][0] == HOSTILE
    assert "alert('" not in page
    assert found.links == []
    assert "default-src 'none'" in page


def test_pieces_of_characters_and_control_characters_are_shown_as_what_they_are() -> None:
    first, second, third = ("é".encode()[:1], "é".encode()[1:], b"\n\t\x00\r")
    found = Page(render_heat_map(heat(token(first), token(second), token(third), token(b"", top=[])))).tokens
    assert [text for text, _ in found] == ["c3", "é", "↵\n⇥00CR", "■\n"]
    titles = [(attrs["title"] or "").split("\n") for _, attrs in found]
    assert titles[0][0] == "“\\xc3”"
    assert titles[2][0] == r"“\n\t\x00\r”"
    assert titles[3][:2] == ["end of text", "0 bytes"]


def test_the_headline_and_the_curve_are_the_bits_over_the_bytes() -> None:
    page = render_heat_map(heat(*(token(b"ab", 3.0, entropy=2.0, rank=1 + n % 2) for n in range(50))))
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts == {
        "bits per byte": "1.500",
        "tokens": "50",
        "bytes": "100",
        "mean surprisal, bits": "3.000",
        "mean predictive entropy, bits": "2.000",
        "first choice was right": "50.0 %",
    }
    assert "running mean of bits per byte, 1.500 at the end" in page


def test_words_say_what_the_number_is_and_is_not() -> None:
    page = html.unescape(render_heat_map(heat(token(b"x"), notes=["It bounds nothing."])))
    for words in ("surprisal estimate, bits: what it is; what it is not.", "It bounds nothing."):
        assert words in page


@pytest.mark.parametrize("stops", [LIGHT, DARK])
def test_text_is_legible_on_every_color_and_lightness_orders_them(stops: list[str]) -> None:
    colors = scale(stops)
    assert (len(colors), colors[0], colors[-1]) == (STEPS, stops[0], stops[-1])
    assert min(contrast(text_color(color), color) for color in colors) >= 4.5
    lightness = [contrast(color, "#000000") for color in colors]
    rising = sorted(lightness, reverse=stops is LIGHT)
    assert lightness == pytest.approx(rising, abs=0.15)  # in shades of gray the order stays


def test_both_scales_are_on_the_page_and_nothing_comes_from_elsewhere() -> None:
    page = render_heat_map(heat(token(b"x")))
    light, _, dark = page.partition("@media screen and (prefers-color-scheme: dark) {\n.h0")
    assert f".h32{{background:{LIGHT[-1]}" in light
    assert f".h32{{background:{DARK[-1]}" in dark
    assert not re.search(r"https?://|url\((?!#)|@import", page)


def test_too_much_or_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat_map, "MOST_TOKENS", 2)
    for tokens in ([], [token(b"x")] * 3):
        with pytest.raises(DataError, match=r"tokens, expected 1 to 2 on a page"):
            render_heat_map(heat(*tokens))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_runs_the_script_and_finds_no_fault(tmp_path: Path) -> None:
    path = write_heat_map(heat(*(token(f" word{n}".encode(), n / 2) for n in range(40))), tmp_path / "page.html")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    command = [BROWSER or "", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-script="on"' in done.stdout
    assert "title=" not in done.stdout.partition("<p class=")[2].partition("</p>")[0]  # the titles became tooltips
    assert "Uncaught" not in done.stderr
