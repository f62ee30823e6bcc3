"""What a sub-question with its answer asserts about a zebra puzzle, where every word of it is understood.

"Who keeps horses?" "Bob" asserts that two values are at one house, and so does "Which house is Bob's?" "2". Only this
is read: one value or house in the question, one in the answer, and nothing but the puzzle's own words and harmless ones
around them. A word that may turn the meaning (left, not, if, or) is not among these, so its statement asserts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from luthier.tasks.zebra import ORDINALS, Cell, Term, Zebra, places, words

_HARMLESS = """
a an the is are does do has have having with of in at to for as by that this there his her their its it who whose what
which where person one people name named called house number position live lives living lived reside resides located
found own owns owner keep keeps keeper love loves lover like likes drink drinks drinker drinking smoke smokes smoker
smoking eat eats eater eating use uses user prefer prefers favorite favourite kind type only must therefore so then thus
hence now provide your final answer puzzle child mother occupant resident
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Words that never turn what a statement means."""
HOUSE_WORDS = frozenset({"house", "position", "number"})
SYNONYMS = {"animals": {"animal", "pet"}, "color": {"colour"}, "child": {"son", "daughter", "kid"}, "lunch": {"food"}}
_SOURCE = re.compile(
    r"\b(?:according to|based on|given|from|by|using|per)\s+(?:the\s+)?clues?\s+#?\d+"
    r"(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+)#?\d+)*\s*,?",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"\bhouse\s+(?:number\s+|no\.?\s*|#\s*)?(\d)\b", re.IGNORECASE)
_COUNTED = re.compile(rf"\b(?:the\s+)?({'|'.join(ORDINALS)}|\d(?:st|nd|rd|th))\s+house\b", re.IGNORECASE)
_BARE_HOUSE = re.compile(rf"#?(\d)|(?:the\s+)?({'|'.join(ORDINALS)}|\d(?:st|nd|rd|th))", re.IGNORECASE)


def asserted(puzzle: Zebra, question: str, answer: str) -> tuple[Cell, Cell] | None:
    """The two cells that a statement puts at one house; None when it says something else or is not understood."""
    asked_of, rest = _cells(puzzle, _SOURCE.sub(" ", question))
    if len(asked_of) != 1 or not _understood(puzzle, rest):
        return None
    (given,) = asked_of
    wanted = _wanted(puzzle, rest)
    stated = None if wanted is None else _stated(puzzle, answer, wanted, given)
    if stated is None or _kind(stated) == _kind(given) or not (_inside(puzzle, given) and _inside(puzzle, stated)):
        return None
    return given, stated


def _kind(cell: Cell) -> str:
    return "house" if isinstance(cell, int) else cell[0]


def _inside(puzzle: Zebra, cell: Cell) -> bool:
    return not isinstance(cell, int) or 1 <= cell <= puzzle.houses


def _cells(puzzle: Zebra, text: str) -> tuple[set[Cell], list[str]]:
    """The houses and values that a text names, and the words that are left."""
    found: set[Cell] = set()

    def take(match: re.Match[str]) -> str:
        found.add(_house(match[1]))
        return " , "

    text = _COUNTED.sub(take, _NUMBERED.sub(take, text))
    said = words(text)
    for phrase, term in sorted(puzzle.phrases.items(), key=lambda pair: -len(words(pair[0]))):
        if len(words(phrase)) > 1:
            found.update({term} if _cut(words(phrase), said, exactly=True) else ())
    for attribute, value in sorted(puzzle.terms, key=lambda term: -len(words(term[1]))):
        spoken = words(value)
        if len(_owners(puzzle, value)) > 1:
            continue  # Alice may be the person or the child: only the puzzle's own words tell
        if _cut(spoken, said, exactly=attribute == "name"):
            found.add((attribute, value))
    return found, said


def _house(text: str) -> int:
    return ORDINALS.index(text.lower()) + 1 if text.lower() in ORDINALS else int(text[0])


def _owners(puzzle: Zebra, value: str) -> list[str]:
    return [attribute for attribute, values in puzzle.attributes if value in values]


def _cut(value: Sequence[str], said: list[str], *, exactly: bool) -> bool:
    """Take a value out of the words of a text, wherever it stands; whether it was there."""
    there = False
    for place in reversed(places(value, said)):
        spoken = said[place.start : place.stop]
        if not exactly or all(s in (v, f"{v}s", f"{v}'s") for s, v in zip(spoken, value, strict=True)):
            said[place.start : place.stop] = ["|"]
            there = True
    return there


def _nouns(attribute: str) -> set[str]:
    return {attribute, f"{attribute}s", attribute.removesuffix("s"), *SYNONYMS.get(attribute, ())} | (
        {"nationality"} if attribute == "nationalities" else set()
    )


def _understood(puzzle: Zebra, rest: Iterable[str]) -> bool:
    """Whether the words around the values are harmless: ours, the attributes' names, or the puzzle's own phrasing."""
    own = {word for phrase in puzzle.phrases for word in words(phrase)}
    own |= {noun for attribute, _ in puzzle.attributes for noun in _nouns(attribute)}
    return all(word == "|" or word in own or word in HARMLESS for word in rest)


def _wanted(puzzle: Zebra, rest: Sequence[str]) -> str | None:
    """What is asked for: 'house', an attribute, 'any' (a verb tells, such as drink); None: it is not clear."""
    nouns = {noun: attribute for attribute, _ in puzzle.attributes for noun in _nouns(attribute)}
    met = {nouns[word] for word in rest if word in nouns}
    if len(met) > 1:
        return None  # the name of somebody's child is not a name
    start = next((place for place, word in enumerate(rest) if word in ("where", "what", "which", "who", "whose")), None)
    if start is None or rest[start] == "whose":
        return None
    wanted = "house" if rest[start] == "where" else "name" if rest[start] == "who" else None
    asked = (_asked(word, nouns) for word in rest[start + 1 :])
    wanted = wanted or next((one for one in asked if one is not None), None)
    return None if wanted is None or (met - {wanted} and wanted != "house") else wanted


def _asked(word: str, nouns: Mapping[str, str]) -> str | None:
    """What a word after 'what' or 'which' asks for."""
    if word in ("person", "who"):
        return "name"
    if word in HOUSE_WORDS:
        return "house"
    return nouns.get(word) or ("any" if word in ("does", "do", "has", "have", "|") else None)


def _stated(puzzle: Zebra, answer: str, wanted: str, given: Cell) -> Cell | None:
    """The one cell of the wanted kind that an answer names, beside what was asked about."""
    if wanted == "house" and (bare := _BARE_HOUSE.fullmatch(answer.strip().rstrip("."))):
        return _house(bare[1] or bare[2])
    alone = _alone(puzzle, answer, wanted)
    if alone is not None:
        return alone
    cells, rest = _cells(puzzle, answer)
    left = cells - {given}
    if len(left) != 1 or not _understood(puzzle, rest):
        return None
    (cell,) = left
    return cell if wanted in (_kind(cell), "any") else None


def _alone(puzzle: Zebra, answer: str, wanted: str) -> Term | None:
    """An answer that is nothing but a value of the attribute asked for, even where another has the same word."""
    said = words(answer)
    found = [
        (attribute, value)
        for attribute, value in puzzle.terms
        if wanted in (attribute, "any") and places(words(value), said) == [range(len(said))]
    ]
    return found[0] if len(found) == 1 else None
