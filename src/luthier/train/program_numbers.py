"""Numbers in text: found with one regular expression, longest match first, exact as fractions, and written back alike.

1,250.50 and -3 and 3/4 and 2 1/2 and 2½ are one number each. What only looks like one is passed over whole: 5:30,
3/4/2020, 2020-03-04, 1.2.3, 2nd, 1e5, B12. Only the digits 0 to 9 count. A percent sign or unit is no part of a number.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Style = Literal["integer", "decimal", "fraction", "mixed"]

_START = r"(?<![0-9A-Za-z_])(?<![0-9]\.)"
_SIGN = rf"{_START}(?<![)\]}}%$€£¥])(?P<sign>[-\u2212]?)(?:[$€£¥](?P<inner>[-\u2212]?))?"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_VULGAR = "[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
_TOKEN = re.compile(
    rf"(?P<opaque>{_START}(?:"
    r"[0-9]+(?::[0-9]+)+|[0-9]+(?:/[0-9]+){2,}|[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]+(?:\.[0-9]+){2,}"
    r"|[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]+|[0-9]+(?:st|nd|rd|th)\b|[0-9]+/0+(?![0-9])))"
    rf"|(?:{_SIGN}|{_START})(?:"
    rf"(?P<mixed>[0-9]+ [0-9]+/[0-9]+(?![0-9/])|[0-9]*{_VULGAR})"
    r"|(?P<fraction>[0-9]+/[0-9]+(?![0-9/]))"
    rf"|(?P<decimal>{_WHOLE}\.[0-9]+|(?<![0-9.])\.[0-9]+)"
    rf"|(?P<integer>{_WHOLE}))"
)
_WORDS = {
    **dict.fromkeys(("two", "twice", "double", "doubles", "doubled", "pair", "pairs", "couple"), "2"),
    **dict.fromkeys(("three", "thrice", "triple", "triples", "tripled"), "3"),
    **dict.fromkeys(("half", "halves", "halved"), "1/2"),
    **dict.fromkeys(("quarter", "quarters"), "1/4"),
    **dict.fromkeys(("dozen", "dozens", "twelve"), "12"),
    "thirds": "1/3",
    "four": "4",
    "quadruple": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twenty": "20",
    "hundred": "100",
    "thousand": "1000",
}


@dataclass(frozen=True)
class Number:
    """A number and where it stands: text[start:end]."""

    start: int
    end: int
    text: str
    value: Fraction
    style: Style

    @property
    def places(self) -> int:
        """Digits after the point."""
        return len(self.text.partition(".")[2]) if self.style == "decimal" else 0


def find_numbers(text: str) -> list[Number]:
    """All numbers of a text, from left to right."""
    return [number for match in _TOKEN.finditer(text) if (number := _number(match)) is not None]


def last_number(text: str) -> Fraction | None:
    """The value of the last number; None when there is none, or when what comes last only looks like one."""
    tokens = list(_TOKEN.finditer(text))
    number = _number(tokens[-1]) if tokens else None
    return None if number is None else number.value


def number_words(text: str) -> frozenset[str]:
    """The values of the numbers that a text has in words: half, twice, dozen, seven. Not one, which is a pronoun."""
    return frozenset(_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS)


def digits(value: Fraction) -> int:
    """Digits before the point, at least 1."""
    return len(str(abs(value.numerator) // value.denominator))


def write_like(number: Number, value: Fraction) -> str:
    """A new value in the dress of an old number: its currency sign, thousands separators, places or bar."""
    if value == number.value:
        return number.text
    sign = "-" if value < 0 else ""
    currency = next((mark for mark in "$€£¥" if mark in number.text), "")
    return sign + currency + _write_plain(number, abs(value))


def write_answer(value: Fraction) -> str:
    """A value as an integer or finite decimal where it is one, as p/q otherwise."""
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest //= 10 if rest % 10 == 0 else 5 if rest % 5 == 0 else 2
        places += 1
    if rest != 1:
        return str(value)
    return ("-" if value < 0 else "") + _write_decimal(abs(value), places)


def decimal_places(value: Fraction) -> int | None:
    """Digits after the point of a finite decimal; None for any other fraction."""
    text = write_answer(value)
    return None if "/" in text else len(text.partition(".")[2])


def _number(match: re.Match[str]) -> Number | None:
    if match["opaque"] is not None:
        return None
    style: Style = match.lastgroup  # type: ignore[assignment]
    body = match[style]
    try:
        value = _mixed(body) if style == "mixed" else Fraction(body.replace(",", ""))
    except ZeroDivisionError:
        return None
    return Number(match.start(), match.end(), match[0], -value if match["sign"] or match["inner"] else value, style)


def _mixed(text: str) -> Fraction:
    if " " in text:
        whole, _, part = text.partition(" ")
    else:
        whole, part = text[:-1], unicodedata.normalize("NFKC", text[-1]).replace("\u2044", "/")
    return int(whole or 0) + Fraction(part)


def _write_plain(number: Number, value: Fraction) -> str:
    if number.style == "fraction":
        return f"{value.numerator}/{value.denominator}"
    text = _write_decimal(value, number.places)
    whole, point, places = text.partition(".")
    return f"{int(whole):,}{point}{places}" if "," in number.text else text


def _write_decimal(value: Fraction, places: int) -> str:
    """Not rounded: the value must have that many places at most."""
    scaled = value * 10**places
    if scaled.denominator != 1:
        raise ValueError(f"{value} has more than {places} places")
    text = str(scaled.numerator).rjust(places + 1, "0")
    return f"{text[:-places]}.{text[-places:]}" if places else text
