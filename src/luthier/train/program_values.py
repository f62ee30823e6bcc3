"""Parameters of a word problem, tied to where they stand in its question, and the new values that they may take.

Magnitudes stay (a mean growth of 2.6 was found in the published data): a value keeps its sign and, within one digit and
a factor of ten, its size; whole numbers stay whole, decimals keep their places, fractions stay proper, and percentages
stay at most 100.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Literal

from luthier.train.program_numbers import Number, digits, write_like

Kind = Literal["count", "amount", "percent"]
KINDS: tuple[Kind, ...] = ("count", "amount", "percent")
Values = Mapping[str, Fraction]
MOST_DRAWS = 2000


@dataclass(frozen=True)
class Parameter:
    """An input of the program: its name, what it counts, and the number of the question that it is."""

    name: str
    kind: Kind
    number: Number


def fits(parameter: Parameter, value: Fraction) -> str:
    """Why a new value may not stand for the old one; empty when it may."""
    old = parameter.number
    if value == old.value:
        return ""
    if old.style == "mixed":
        return "mixed numbers are not changed"
    if (value > 0) - (value < 0) != (old.value > 0) - (old.value < 0):
        return "another sign"
    if abs(digits(value) - digits(old.value)) > 1 or not Fraction(1, 10) <= value / old.value <= 10:
        return "another order of magnitude"
    if parameter.kind == "percent" and old.value <= 100 < value:
        return "more than 100 %"
    return _fits_style(old, value)


def _fits_style(old: Number, value: Fraction) -> str:
    if old.style == "fraction":
        proper = abs(old.value) < 1
        same_size = abs(len(str(value.denominator)) - len(old.text.rpartition("/")[2])) <= 1
        if value.denominator == 1 or not same_size or proper != (abs(value) < 1):
            return "another kind of fraction"
    elif (value * 10**old.places).denominator != 1:
        return "more places" if old.places else "not a whole number"
    return ""


def substitute(question: str, parameters: Sequence[Parameter], texts: Mapping[str, str]) -> str:
    """The question with the text of each parameter, by its name, where its number stood. All else stays as it is."""
    parts, position = [], 0
    for parameter in sorted(parameters, key=lambda p: p.number.start):
        parts += [question[position : parameter.number.start], texts[parameter.name]]
        position = parameter.number.end
    return "".join([*parts, question[position:]])


def masked(question: str, parameters: Sequence[Parameter]) -> str:
    """The question with {name} for each parameter."""
    return substitute(question, parameters, {p.name: f"{{{p.name}}}" for p in parameters})


def with_values(question: str, parameters: Sequence[Parameter], values: Values) -> str:
    """The question with new values, written like the old ones."""
    texts = {p.name: write_like(p.number, values[p.name]) for p in parameters}
    return substitute(question, parameters, texts)


def draw_values(parameters: Sequence[Parameter], seed: int) -> Iterator[dict[str, Fraction]]:
    """Distinct random values with as many digits as the old ones, in the same order by size within each kind.

    The order keeps parts smaller than wholes; round numbers stay round. Ends after 2,000 draws.
    """
    rng = random.Random(seed)
    old = {p.name: p.number.value for p in parameters}
    seen = {tuple(old.values())}
    for _ in range(MOST_DRAWS):
        new = {p.name: _draw(p, rng) for p in parameters}
        if tuple(new.values()) not in seen and _same_order(parameters, old, new):
            seen.add(tuple(new.values()))
            yield new


def _same_order(parameters: Sequence[Parameter], old: Values, new: Values) -> bool:
    return all(
        (old[a.name] > old[b.name]) == (new[a.name] > new[b.name])
        and (old[a.name] < old[b.name]) == (new[a.name] < new[b.name])
        for a, b in itertools.combinations(parameters, 2)
        if a.kind == b.kind
    )


def _draw(parameter: Parameter, rng: random.Random) -> Fraction:
    old = parameter.number
    if old.style == "mixed" or old.value == 0:
        return old.value
    sign = 1 if old.value > 0 else -1
    new = _draw_fraction(old, rng) if old.style == "fraction" else _draw_decimal(old, rng)
    # Where the draw leaves the allowed range (a percentage above 100), the number stays.
    return old.value if fits(parameter, sign * new) else sign * new


def _draw_decimal(old: Number, rng: random.Random) -> Fraction:
    """With as many digits before and after the point, and as many zeros at the end of a whole number."""
    unit = 10**old.places
    scaled = str(abs(old.value.numerator * unit // old.value.denominator))
    zeros = len(scaled) - len(scaled.rstrip("0"))
    low = 10 ** (len(scaled) - zeros - 1)
    return Fraction(rng.randint(low, 10 * low - 1) * 10**zeros, unit)


def _draw_fraction(old: Number, rng: random.Random) -> Fraction:
    """In lowest terms, with a denominator of as many digits; proper when the old one was."""
    below = len(old.text.rpartition("/")[2])
    denominator = rng.randint(max(2, 10 ** (below - 1)), 10**below - 1)
    top = denominator - 1 if abs(old.value) < 1 else 10 * denominator
    numerator = rng.randint(1, top) if abs(old.value) < 1 else rng.randint(denominator + 1, top)
    shared = gcd(numerator, denominator)
    return Fraction(numerator // shared, denominator // shared)
