"""Zebra puzzles: reading one from its text, and what its clues decide.

Houses stand in a row; of every attribute (name, color, pet, ...) each house has one value, no two the same. A clue ties
two values, or a value and a house. Only the text of a puzzle is looked at: its answer is nowhere in here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MOST_GUESSES = 20_000
"""Guesses after which the search for an arrangement is given up."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_GENERAL = """
a accompanied all are by each everyone favorite different for has have houses in is it keep mother of people person
something the their they type unique use
"""
GENERAL = frozenset(_GENERAL.split())
"""Words of an attribute's line that do not name the attribute."""

Term = tuple[str, str]
"""An attribute and one of its values."""
_TURNING = "not no neither nor never either or perhaps maybe if unless left right next between beside"
TURNING = frozenset(_TURNING.split())
"""Words with which a phrase does not simply name its value."""
Cell = Term | int
"""A value, or a house counted from 1."""
Relation = Callable[[int, int], bool]
RELATIONS: dict[str, Relation] = {
    "same": lambda a, b: a == b,
    "different": lambda a, b: a != b,
    "just left": lambda a, b: a + 1 == b,
    "just right": lambda a, b: a == b + 1,
    "beside": lambda a, b: abs(a - b) == 1,
    "left": lambda a, b: a < b,
    "right": lambda a, b: a > b,
    "one between": lambda a, b: abs(a - b) == 2,
    "two between": lambda a, b: abs(a - b) == 3,
}
_BETWEEN = [
    (" is directly left of ", "", "just left"),
    (" is directly right of ", "", "just right"),
    (" is somewhere to the left of ", "", "left"),
    (" is somewhere to the right of ", "", "right"),
    (" and ", " are next to each other", "beside"),
    (" is ", "", "same"),
]
"""What stands between two values, what follows them, and the relation that is meant."""
_GAP = re.compile(r"there (?:is|are) (?P<many>one|two) houses? between (?P<rest>.+)")
_PLACE = re.compile(rf"(?P<value>.+) is (?P<no>not )?in the (?P<place>{'|'.join(ORDINALS)}) house")
_HOUSES = re.compile(r"There are (\d+) houses")
_ATTRIBUTE = re.compile(r"^ *- (?P<head>[^:\n]+): (?P<values>.+)$", re.MULTILINE)
_CLUE = re.compile(r"^\d+\. (?P<clue>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Clue:
    """A relation of two cells, and the phrases of the puzzle that name its values."""

    relation: str
    first: Term
    second: Cell
    phrases: tuple[tuple[str, Term], ...] = ()


@dataclass(frozen=True)
class Zebra:
    """A puzzle. Attributes are named by their own word: name, color, animal, ..."""

    houses: int
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    clues: tuple[Clue, ...]

    @property
    def terms(self) -> list[Term]:
        """All values of all attributes."""
        return [(attribute, value) for attribute, values in self.attributes for value in values]

    @property
    def phrases(self) -> dict[str, Term]:
        """The puzzle's own words for its values."""
        return {phrase: term for clue in self.clues for phrase, term in clue.phrases}

    def decides(self, first: Cell, second: Cell) -> bool | None:
        """Whether two cells are at one house: in every arrangement, in none (False), or undecided (None)."""
        return _decides(self, first, second)


# Reading


@functools.lru_cache(maxsize=64)
def read_zebra(text: str) -> Zebra | None:
    """The puzzle that a text states, or None when any of it is not understood."""
    count = _HOUSES.search(text)
    attributes = tuple(
        (_noun(match["head"]), tuple(value.strip().lower() for value in match["values"].split(",")))
        for match in _ATTRIBUTE.finditer(text)
    )
    if count is None or not attributes or len(dict(attributes)) < len(attributes):
        return None
    houses = int(count[1])
    if houses > len(ORDINALS) or any(len(set(values)) != houses for _, values in attributes):
        return None
    terms = [(attribute, value) for attribute, values in attributes for value in values]
    clues = [_read_clue(match["clue"], terms) for match in _CLUE.finditer(text)]
    read = tuple(clue for clue in clues if clue is not None)
    return Zebra(houses, attributes, read) if read and len(read) == len(clues) else None


def _noun(head: str) -> str:
    """The word that names an attribute: 'animals' of 'The people keep different animals'."""
    return next((word for word in words(head) if word not in GENERAL), head)


def words(text: str) -> list[str]:
    """Words in lower case: letters and digits, with apostrophes and hyphens inside."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text.lower())


def _read_clue(text: str, terms: Sequence[Term]) -> Clue | None:
    clue = text.strip().lower().removesuffix(".")
    if match := _GAP.fullmatch(clue):
        return _pair(match["rest"], " and ", f"{match['many']} between", terms)
    if match := _PLACE.fullmatch(clue):
        value = find_term(match["value"], terms)
        relation = "different" if match["no"] else "same"
        house = ORDINALS.index(match["place"]) + 1
        return None if value is None else Clue(relation, value, house, ((match["value"].strip(), value),))
    for middle, end, relation in _BETWEEN:
        if middle in clue and clue.endswith(end):
            return _pair(clue.removesuffix(end), middle, relation, terms)
    return None


def _pair(text: str, middle: str, relation: str, terms: Sequence[Term]) -> Clue | None:
    """The clue of the first cut that leaves a value on both sides: a later one would be inside the second phrase."""
    for match in re.finditer(f"(?={re.escape(middle)})", text):
        left, right = text[: match.start()].strip(), text[match.start() + len(middle) :].strip()
        first, second = find_term(left, terms), find_term(right, terms)
        if first is None or second is None or first == second:
            continue
        if relation != "same" or first[0] != second[0]:
            return Clue(relation, first, second, ((left, first), (right, second)))
    return None


def find_term(phrase: str, terms: Sequence[Term]) -> Term | None:
    """The value that a phrase names: a name alone, or the longest value among its words. None: none, or several."""
    said = words(phrase)
    if TURNING & set(said):
        return None
    alone = [term for term in terms if words(term[1]) == said]
    if named := [term for term in alone if term[0] == "name"] or alone:
        return named[0] if len(named) == 1 else None
    held = [term for term in terms if term[0] != "name" and any(places(words(term[1]), said))]
    size = max((len(words(value)) for _, value in held), default=0)
    longest = [term for term in held if len(words(term[1])) == size]
    return longest[0] if len(longest) == 1 else None


def places(value: Sequence[str], said: Sequence[str]) -> list[range]:
    """Where the words of a value stand among others."""
    starts = range(len(said) - len(value) + 1)
    return [range(i, i + len(value)) for i in starts if all(map(alike, value, said[i : i + len(value)]))]


def alike(value: str, word: str) -> bool:
    """Whether a word is the value in another form: horse and horses, roses and rose, brit and british."""
    if word in (value, f"{value}s"):
        return True
    stem = value[: max(4, len(value) - 1)]
    return len(value) >= 4 and word.startswith(stem) and len(word) - len(value) <= 3


# Deciding


@functools.lru_cache(maxsize=4096)
def _decides(puzzle: Zebra, first: Cell, second: Cell) -> bool | None:
    if isinstance(first, int):
        return first == second if isinstance(second, int) else _decides(puzzle, second, first)
    whole = _first_arrangements(puzzle)
    if whole is None or not whole:
        return None  # too hard, or clues that contradict each other
    if len(whole) == 1:
        at = whole[0]
        return at[first] == (frozenset({second}) if isinstance(second, int) else at[second])
    together, apart = (_possible(puzzle, Clue(relation, first, second)) for relation in ("same", "different"))
    return None if together is None or apart is None or together == apart else together


@functools.lru_cache(maxsize=64)
def _first_arrangements(puzzle: Zebra) -> list[Rooms] | None:
    """The only arrangement, or two of several; None when the search was given up."""
    try:
        return list(itertools.islice(_search(puzzle, puzzle.clues, _anywhere(puzzle), _Guesses()), 2))
    except TooHard:
        return None


def _possible(puzzle: Zebra, claim: Clue) -> bool | None:
    """Whether some arrangement keeps the clues and a claim; None when the search was given up."""
    try:
        return any(True for _ in _search(puzzle, (*puzzle.clues, claim), _anywhere(puzzle), _Guesses()))
    except TooHard:
        return None


Rooms = dict[Term, frozenset[int]]
"""Houses that are still open to each value."""


class TooHard(Exception):
    """The search took too many guesses."""


class _Guesses:
    def __init__(self) -> None:
        self.left = MOST_GUESSES

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise TooHard


def _anywhere(puzzle: Zebra) -> Rooms:
    return dict.fromkeys(puzzle.terms, frozenset(range(1, puzzle.houses + 1)))


def _search(puzzle: Zebra, clues: Sequence[Clue], rooms: Rooms, guesses: _Guesses) -> Iterator[Rooms]:
    """All arrangements within these rooms. Raises: TooHard."""
    guesses.take()
    narrowed = _narrow(puzzle, clues, rooms)
    if narrowed is None:
        return
    open_ = [term for term, houses in narrowed.items() if len(houses) > 1]
    if not open_:
        yield narrowed
        return
    term = min(open_, key=lambda term: len(narrowed[term]))
    for house in sorted(narrowed[term]):
        yield from _search(puzzle, clues, {**narrowed, term: frozenset({house})}, guesses)


def _narrow(puzzle: Zebra, clues: Sequence[Clue], rooms: Rooms) -> Rooms | None:
    """The rooms without what the clues rule out one by one; None when a value has no house left."""
    rooms, before = dict(rooms), None
    while rooms != before:
        before = dict(rooms)
        for clue in clues:
            allowed, second = RELATIONS[clue.relation], clue.second
            others = frozenset({second}) if isinstance(second, int) else rooms[second]
            rooms[clue.first] = frozenset(a for a in rooms[clue.first] if any(allowed(a, b) for b in others))
            if not isinstance(second, int):
                rooms[second] = frozenset(b for b in others if any(allowed(a, b) for a in rooms[clue.first]))
        for attribute, values in puzzle.attributes:
            _spread([(attribute, value) for value in values], rooms)
        if not all(rooms.values()):
            return None
    return rooms


def _spread(terms: Sequence[Term], rooms: Rooms) -> None:
    """A house that is taken is closed to the other values; one that only one value can have is that value's."""
    for term in terms:
        if len(rooms[term]) == 1:
            for other in terms:
                if other != term:
                    rooms[other] -= rooms[term]
    for house in range(1, len(terms) + 1):
        able = [term for term in terms if house in rooms[term]]
        if len(able) == 1:
            rooms[able[0]] = frozenset({house})
        elif not able:
            rooms[terms[0]] = frozenset()
