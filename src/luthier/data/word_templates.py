"""The wording of word problems: seed templates with the calculation that each asks for, and the words that fill them.

A template's text has slots for words (`{a}`, `{b}` people; `{x}` things; `{c}`, `{d}` containers, in the plural) and
for numbers (`{0}`, `{1}`, `{2}`: leaf ids). Each question has 13 words or more and is dense with names and numbers, so
that a run of 13 words says which question it is from.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from string import Formatter

PEOPLE = (
    *("Ada", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo"),
    *("Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Yara", "Zoe"),
)
THINGS = (
    *("apples", "beads", "books", "bows", "coins", "cards", "eggs", "figs", "keys", "maps"),
    *("nuts", "pears", "pens", "pins", "plums", "rings", "seeds", "shells", "stones", "strings"),
)
CONTAINERS = ("bags", "baskets", "boxes", "cases", "drawers", "jars", "pots", "trays")


@dataclass(frozen=True)
class Constant:
    """A number that only the wording implies (twice: 2). It stands nowhere in the question and is never changed."""

    value: int


Shape = int | Constant | tuple[str, "Shape", "Shape"]
"""A calculation: a leaf id, a constant, or (sign, left, right)."""


@dataclass(frozen=True)
class Template:
    """A wording and its calculation."""

    name: str
    text: str
    shape: Shape


@functools.cache
def pieces(text: str) -> tuple[tuple[str, str], ...]:
    """A text with slots in pairs: what stands before each slot and the name of the slot, which is empty at the end."""
    return tuple((before, slot or "") for before, slot, _, _ in Formatter().parse(text))


ONE_STEP = (
    Template("gain", "{a} has {0} {x}. {b} hands over {1} more {x}. How many {x} does {a} have now?", ("+", 0, 1)),
    Template(
        "places",
        "{a} keeps {0} {x} in the {c} and {1} {x} in the {d}. How many {x} does {a} keep in all?",
        ("+", 0, 1),
    ),
    Template("loss", "{a} picks {0} {x}. {a} gives {1} of them to {b}. How many {x} are left for {a}?", ("-", 0, 1)),
    Template(
        "difference", "{a} carries {0} {x} and {b} carries {1}. How many more {x} does {a} carry than {b}?", ("-", 0, 1)
    ),
    Template("part", "{a} and {b} find {0} {x}. Of these {x}, {b} finds {1}. How many does {a} find?", ("-", 0, 1)),
    Template("groups", "{a} packs {0} {c} for {b}, with {1} {x} in each. How many {x} does {a} pack?", ("*", 0, 1)),
    Template("rate", "Every day {a} buys {0} {x} from {b}. How many {x} does {a} buy in {1} days?", ("*", 0, 1)),
    Template(
        "twice", "{b} finds {0} {x}. {a} finds twice as many as {b}. How many {x} does {a} find?", ("*", Constant(2), 0)
    ),
)
TWO_STEPS = (
    Template(
        "gain and loss",
        "{a} has {0} {x}, buys {1} more and gives {2} to {b}. How many {x} does {a} have left?",
        ("-", ("+", 0, 1), 2),
    ),
    Template(
        "loss and gain",
        "{a} has {0} {x} and loses {1} of them. Then {b} brings {a} {2} {x}. How many {x} does {a} have?",
        ("+", ("-", 0, 1), 2),
    ),
    Template(
        "three days",
        "{a} sells {0} {x} on Monday, {1} on Tuesday and {2} on Friday, all to {b}. How many {x} does {a} sell?",
        ("+", ("+", 0, 1), 2),
    ),
    Template(
        "groups and gain",
        "{a} has {0} {c} with {1} {x} in each, and {b} adds {2} {x}. How many {x} does {a} have now?",
        ("+", ("*", 0, 1), 2),
    ),
    Template(
        "groups and loss",
        "{a} has {0} {c} with {1} {x} in each. {b} takes {2} of them. How many {x} does {a} still have?",
        ("-", ("*", 0, 1), 2),
    ),
    Template(
        "more and both",
        "{b} has {0} {x}. {a} has {1} {x} more than {b}. How many {x} do {a} and {b} have together?",
        ("+", 0, ("+", 0, 1)),
    ),
    Template(
        "price of the rest",
        "{a} has {0} {x} and drops {1}. {b} pays {2} dollars for each of the rest. How many dollars does {a} get?",
        ("*", ("-", 0, 1), 2),
    ),
)
