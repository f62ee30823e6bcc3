"""Zebra puzzles of the real task: all of them are read, and their clues decide what they decide."""

from __future__ import annotations

import itertools

import pytest

from luthier.tasks.puzzles import _kept, make_zebra, zebra, zebra_compat
from luthier.tasks.zebra import RELATIONS, Cell, Clue, Term, Zebra, find_term, read_zebra

PUBLISHED = "cea181bbf879ce5ee410038a63c7ae8ed5e427fcfb6e529205c48e2fecbc1ae5"
OURS = "4831e136be7630b3484c76d14061b68eb2fddc90741ced0ec962930656c1c645"
SMALL = [(9, 2, 2), (22, 3, 4), (23, 2, 2)]

TEXT = """There are 3 houses (numbered 1 on the left, 3 on the right).
 - Each person has a unique name: alice, bob, eve
 - Each person has a favorite drink: tea, boba tea, milk

1. Alice is somewhere to the left of Bob.
2. The boba tea drinker is not in the second house.
3. There is one house between Bob and the tea drinker.
"""


def arrangements(puzzle: Zebra) -> list[dict[Term, int]]:
    """All that keep the clues, by trying everything: the slow, obvious way."""
    orders = [
        [{(name, value): place for place, value in enumerate(order, 1)} for order in itertools.permutations(values)]
        for name, values in puzzle.attributes
    ]
    whole = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*orders)]
    return [at for at in whole if all(holds(clue, at) for clue in puzzle.clues)]


def holds(clue: Clue, at: dict[Term, int]) -> bool:
    second = clue.second if isinstance(clue.second, int) else at[clue.second]
    return RELATIONS[clue.relation](at[clue.first], second)


def test_the_puzzles_are_these() -> None:
    assert (zebra().sha256, zebra_compat().sha256) == (OURS, PUBLISHED)
    assert len({problem.prompt for problem in zebra().problems}) == 100
    assert len({problem.prompt for problem in zebra_compat().problems}) == 34  # of 36 sizes


@pytest.mark.parametrize("key", SMALL)
def test_what_is_kept_is_what_reasoning_gym_makes(key: tuple[int, int, int]) -> None:
    kept = _kept()[key]
    assert make_zebra(*key) == {"question": kept["question"], "answer": kept["answer"]}


def test_all_puzzles_are_read_and_decided() -> None:
    """The true name of the asked house passes, every other one fails: nothing is undecided."""
    for problem in zebra().problems:
        puzzle = read_zebra(problem.prompt)
        assert puzzle is not None
        assert (puzzle.houses, len(puzzle.attributes)) == (
            problem.metadata["people"],
            problem.metadata["characteristics"],
        )
        for name in dict(puzzle.attributes)["name"]:
            assert puzzle.decides(("name", name), 1) is (name == problem.answer)


def test_the_search_agrees_with_trying_everything() -> None:
    small = [problem for problem in zebra().problems if problem.metadata["people"] <= 3]
    texts = [TEXT, *(problem.prompt for problem in small if problem.metadata["characteristics"] <= 4)]
    assert len(texts) > 5
    for text in texts:
        puzzle = read_zebra(text)
        assert puzzle is not None
        fewer = Zebra(puzzle.houses, puzzle.attributes, puzzle.clues[:-1])  # mostly undecided
        for one in (puzzle, fewer):
            found = arrangements(one)
            assert found
            for first, second in itertools.product(one.terms, [*one.terms, *range(1, one.houses + 1)]):
                assert one.decides(first, second) is decided(first, second, found)


def decided(first: Term, second: Cell, found: list[dict[Term, int]]) -> bool | None:
    same = {at[first] == (second if isinstance(second, int) else at[second]) for at in found}
    return same.pop() if len(same) == 1 else None


def test_clues_are_read_as_written() -> None:
    puzzle = read_zebra(TEXT)
    assert puzzle is not None
    assert [(clue.relation, clue.first, clue.second) for clue in puzzle.clues] == [
        ("left", ("name", "alice"), ("name", "bob")),
        ("different", ("drink", "boba tea"), 2),
        ("one between", ("name", "bob"), ("drink", "tea")),
    ]
    assert [puzzle.decides(("drink", "tea"), house) for house in (1, 2, 3)] == [True, False, False]
    assert puzzle.decides(("name", "bob"), ("drink", "tea")) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 2 + 2?",
        TEXT.replace("3 houses", "4 houses"),
        TEXT.replace("alice, bob", "alice, alice"),
        TEXT.replace("somewhere to the left of", "a friend of"),
        TEXT.replace("Alice is somewhere", "Zoe is somewhere"),
        TEXT.replace("1. ", "- ").replace("2. ", "- ").replace("3. There", "- There"),
    ],
)
def test_what_is_not_understood_whole_is_not_read(text: str) -> None:
    assert read_zebra(text) is None


def test_clues_that_contradict_each_other_decide_nothing() -> None:
    puzzle = read_zebra(TEXT + "4. Bob is in the first house.\n")
    assert puzzle is not None
    assert arrangements(puzzle) == []
    assert puzzle.decides(("name", "bob"), 1) is None


@pytest.mark.parametrize(
    ("phrase", "term"),
    [
        ("Alice", ("name", "alice")),
        ("the boba tea drinker", ("drink", "boba tea")),
        ("the tea drinker", ("drink", "tea")),
        ("the person's child is named Alice", ("child", "alice")),
        ("the British person", ("nationalities", "brit")),
        ("the person who loves the rose bouquet", ("flower", "roses")),
        ("the person who smokes Blue Master", ("cigar", "blue master")),
        ("the person who loves blue", ("color", "blue")),
        ("nobody", None),
        ("tea or milk", None),
    ],
)
def test_phrases_name_values(phrase: str, term: Term | None) -> None:
    terms = [("name", "alice"), ("child", "alice"), ("drink", "tea"), ("drink", "boba tea"), ("drink", "milk")]
    terms += [("nationalities", "brit"), ("flower", "roses"), ("cigar", "blue master"), ("color", "blue")]
    assert find_term(phrase, terms) == term
