"""Programs that decide steps: what they prove, what they refute, and that they know nothing but the problem."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import pytest

from luthier.llm import ScriptedBackend
from luthier.llm.types import Request
from luthier.reason import checkers, statements
from luthier.reason.checkers import Verdict, check_step
from luthier.reason.methods import parse_method, solve
from luthier.reason.prompts import FULL, SHORT, Finding, Step
from luthier.reason.session import Models, Solution
from luthier.tasks.puzzles import mini_sudoku, zebra
from luthier.tasks.zebra import read_zebra

ZEBRAS = zebra().problems
CHILDREN = next(problem for problem in ZEBRAS if problem.metadata["people"] == 6 and "Billy is Alice" in problem.prompt)


def verdict(question: str, asked: str, answer: str, *names: str) -> bool | None:
    found = check_step(names or ("zebra",), question, [], Step(asked, answer))
    return None if found is None else found.holds


def test_of_every_puzzle_the_true_answer_passes_and_all_other_names_fail() -> None:
    for problem in ZEBRAS:
        asked = problem.prompt.splitlines()[-1]
        puzzle = read_zebra(problem.prompt)
        assert puzzle is not None
        for name in dict(puzzle.attributes)["name"]:
            for question in (asked, "Who lives in the first house?"):
                assert verdict(problem.prompt, question, name.title()) is (name == problem.answer)


@pytest.mark.parametrize(
    ("question", "answer", "holds"),
    [
        ("What is the name of the person who lives in house 1?", "Arnold", True),
        ("Who lives in the first house?", "Arnold lives in House 1.", True),
        ("Who lives in the 1st house?", "Bob", False),
        ("Which house does Emily live in?", "6", True),
        ("Where does Emily live?", "In the sixth house", True),
        ("In which house is David?", "House 5", False),
        ("According to clue 1, who is the mother of Billy?", "Alice", True),
        ("Who is the person's child is named Alice?", "Carol", True),
        ("What child does Emily have?", "Meredith", True),
        ("Which house number is Bella's mother in?", "1", True),
        # Another relation, a condition, a denial, a choice, a word of no puzzle: these are left to the votes.
        ("Who is directly left of Alice?", "Bob", None),
        ("Who lives next to Bob?", "Carol", None),
        ("Who does not live in house 1?", "Bob", None),
        ("If Bob lives in house 2, who lives in house 1?", "Arnold", None),
        ("Who could live in house 1?", "Bob", None),
        ("Which person lives in house 2?", "Emily or Bob", None),
        ("Which person lives in house 1?", "not Bob", None),
        ("Who lives in house 1 and house 2?", "Bob", None),
        ("Who lives in house 9?", "Bob", None),
        ("Which house is Bob's?", "9", None),
        ("Who lives in house 1?", "Zoe", None),
        ("Who lives in house 1?", "none", None),
        ("Who lives in house 1?", "", None),
        ("Is Bob in house 1?", "yes", None),
        ("What is the name of Carol's child?", "Alice", None),  # Alice is a name here as well
        ("Who is the mother of Alice?", "Carol", None),
        ("Who is Bob?", "Alice", None),
        ("What is 2 + 2?", "4", None),
    ],
)
def test_statements_about_a_puzzle(question: str, answer: str, holds: bool | None) -> None:
    assert verdict(CHILDREN.prompt, question, answer) is holds


@pytest.mark.parametrize("problem", ZEBRAS[:30], ids=lambda problem: problem.id)
def test_statements_in_the_puzzles_own_words(problem: Any) -> None:
    """Every clue that ties two values is proven, and the same with another name is refuted."""
    puzzle = read_zebra(problem.prompt)
    assert puzzle is not None
    names = dict(puzzle.attributes)["name"]
    for clue in puzzle.clues:
        if clue.relation != "same" or isinstance(clue.second, int):
            continue
        (one, first), (other, second) = clue.phrases
        for phrase, told in ((one, second), (other, first)):
            if told[0] == "name":
                for name in names:
                    assert verdict(problem.prompt, f"Who is {phrase}?", name) is (name == told[1])


@pytest.mark.parametrize("text", ["", "no puzzle at all", ZEBRAS[0].prompt.replace("1. ", "1. Perhaps ")])
def test_without_a_puzzle_nothing_is_decided(text: str) -> None:
    assert verdict(text, "Who lives in house 1?", "Bob") is None


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What is 17 + 25?", "42", Verdict(True, "42")),
        ("17 \u00d7 3 = ?", "50", Verdict(False, "51")),
        ("Compute (2 + 3) * 4 mod 7.", "6", Verdict(True, "6")),
        ("What is 1 / 3?", r"\frac{1}{3}", Verdict(True, "1/3")),
        ("What is 1 / 0?", "0", None),
        ("What is 2 + x?", "3", None),
        ("How many apples are 2 + 3 apples?", "5", None),
        ("What is 2 + 3?", "five", None),
        ("What is 9 * (8 + 7?", "1", None),
    ],
)
def test_arithmetic(question: str, answer: str, expected: Verdict | None) -> None:
    assert check_step(("arithmetic",), "a problem", [], Step(question, answer)) == expected


def test_every_mini_sudoku_takes_its_solution_and_no_grid_with_two_cells_exchanged() -> None:
    for problem in mini_sudoku(20).problems:
        rows = [line.split() for line in problem.answer.splitlines()]
        assert verdict(problem.prompt, "What is the grid?", problem.answer, "sudoku") is True
        rows[0][0], rows[0][1] = rows[0][1], rows[0][0]
        wrong = "\n".join(" ".join(row) for row in rows)
        assert verdict(problem.prompt, "What is the grid?", wrong, "sudoku") is False
        assert verdict(problem.prompt, "What is the grid?", "I do not know", "sudoku") is None


def test_no_answer_key_can_be_reached() -> None:
    """A checker is given the problem as it is asked; the code that checks names neither tasks nor their answers."""
    assert list(inspect.signature(check_step).parameters) == ["names", "question", "earlier", "step"]
    for module in (checkers, statements):
        source = inspect.getsource(module)
        named = ("tasks.puzzles", "Problem", "Grader", "reasoning_gym", "gold")
        assert not {word for word in named if word in source}


def reply(request: Request, index: int) -> str:
    """Says Bob lives in house 1 until it is told that this cannot be; re-answers are wrong but for some."""
    said = request.messages[-1]["content"]
    if "JSON only" in said:
        solution = said.split("<solution>\n")[1]
        answer = "Arnold" if "Arnold" in solution else "Bob"
        return json.dumps({"steps": [{"question": "Who lives in house 1?", "answer": answer}]})
    if "take what is already established" in said:
        return f"<answer>{'Arnold' if index == 3 and request.seed != 1 else 'Bob'}</answer>"
    return f"<answer>{'Arnold' if len(request.messages) > 1 else 'Bob'}</answer>"


async def equal(a: str, b: str) -> bool:
    return a.lower() == b.lower()


def solved(method: str, reply: Any = reply) -> tuple[Solution, ScriptedBackend]:
    backend = ScriptedBackend(reply)
    return asyncio.run(solve(CHILDREN.prompt, Models(backend), parse_method(method), equivalence=equal)), backend


def test_a_refuted_step_is_mended_by_the_re_answer_that_is_proven() -> None:
    """Four of five re-answers repeat the mistake: votes alone would confirm it."""
    assert solved("ssr:rounds=2,early_decision=false")[0].answer == "Bob"
    solution, backend = solved("ssr:rounds=2,checkers=[zebra]")
    assert (solution.answer, solution.stop) == ("Arnold", "agreed")
    (step,) = solution.rounds[0].steps
    assert (step.agrees, step.confidence, step.majority, step.decided_by) == (False, 0.0, "Arnold", "checker")
    assert dict(step.votes) == {"Bob": 4, "Arnold": 1}
    assert any("I get Arnold" in m["content"] for request in backend.requests for m in request.messages)


def test_a_refuted_step_without_a_hint_is_done_again() -> None:
    def stubborn(request: Request, index: int) -> str:
        text = reply(request, index)
        return "<answer>Bob</answer>" if "take what is already established" in request.messages[-1]["content"] else text

    solution, backend = solved("ssr:rounds=2,checkers=[zebra]", stubborn)
    assert (solution.answer, solution.stop) == ("Arnold", "agreed")
    assert solution.rounds[0].steps[0].majority is None
    assert any("that cannot be right" in m["content"] for request in backend.requests for m in request.messages)


def test_a_proven_step_costs_no_calls() -> None:
    def right(request: Request, index: int) -> str:
        return reply(request, index).replace("Bob", "Arnold")

    solution, _ = solved("ssr:checkers=[zebra]", right)
    assert (solution.answer, solution.usage.calls) == ("Arnold", 2)
    assert solution.steps[0].decided_by == "checker"


@pytest.mark.parametrize("prompts", [FULL, SHORT])
def test_both_sets_of_wording_can_say_that_a_step_is_refuted(prompts: Any) -> None:
    assert "house 1" in prompts.reflection([Finding(Step("house 1?", "Bob"), None)])
