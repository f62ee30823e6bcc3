"""Lines as steps: on a solver with known habits, against closed forms; and on text."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.llm import ScriptedBackend
from luthier.llm.types import GO_ON, Request
from luthier.reason.lines import pieces_of
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver, chance_of_chain, plurality


async def equal(a: str, b: str) -> bool:
    return a == b


async def ask(backend: object, method: str, question: str, seed: int = 0) -> Solution:
    return await solve(question, Models(backend), parse_method(method), equivalence=equal, seed=seed)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["a = 1", "b", " ", "", "\n", "####2"]), max_size=8))
def test_pieces_are_the_text_cut_before_its_lines(lines: list[str]) -> None:
    text = "\n".join(lines).strip()
    assert "".join(pieces_of(text)) == text
    assert [piece.strip() for piece in pieces_of(text)] == [line.strip() for line in text.split("\n") if line.strip()]


def test_a_sure_solver_is_asked_for_each_line_once() -> None:
    solution = asyncio.run(ask(SimulatedSolver(Habits(error=0.0)), "ssr:steps=lines", Chain.draw(4, 1).question))
    assert (solution.stop, solution.usage.calls) == ("agreed", 1 + 5)
    assert [step.votes for step in solution.steps] == [((step.step.answer, 3),) for step in solution.steps]
    # Of three, the line itself and one more decide.
    words = solution.usage.completion_tokens
    fewer = asyncio.run(ask(SimulatedSolver(Habits(error=0.0)), "ssr:steps=lines,samples=3", Chain.draw(4, 1).question))
    assert fewer.usage.completion_tokens == 2 * words / 3


@pytest.mark.parametrize(("error", "length"), [(0.1, 6), (0.2, 4)])
def test_lines_end_right_as_often_as_majorities_of_steps(error: float, length: int) -> None:
    habits, n = Habits(error=error), 200
    chains = [Chain.draw(length, number) for number in range(n)]

    async def run() -> float:
        solver = SimulatedSolver(habits)
        method = "ssr:steps=lines,rounds=20"
        answers = [(await ask(solver, method, chain.question, seed)).answer for seed, chain in enumerate(chains)]
        return sum(answer == chain.answer for answer, chain in zip(answers, chains, strict=True)) / n

    measured, expected = asyncio.run(run()), plurality(5, error, 8) ** length
    assert abs(measured - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 1 / n) / n)
    assert measured > chance_of_chain(length, habits) + 0.2


def test_first_chains_that_agree_need_no_check_and_others_are_votes() -> None:
    agreed = asyncio.run(ask(SimulatedSolver(Habits(error=0.0)), "ssr:steps=lines,chains=2", Chain.draw(4, 1).question))
    assert (agreed.stop, agreed.usage.calls) == ("agreed", 1)
    chains = ["1+1=2\n2+1=9\n####9", "1+1=2\n2+1=3\n####3"]

    def reply(request: Request, index: int) -> str:
        if not request.stop:
            return chains[index] if request.messages[-1]["role"] == "user" else "####3"
        return "2+1=3" if request.messages[-1]["content"].count("\n") == 1 else "####3"

    solution = asyncio.run(ask(ScriptedBackend(reply), "ssr:steps=lines,chains=2,samples=3", "?"))
    assert [step.votes for step in solution.rounds[0].steps][:2] == [(("1+1=2", 2),), (("2+1=3", 2), ("2+1=9", 1))]
    assert solution.answer == "3"


def test_the_first_outvoted_line_gives_way_and_the_rest_follows_from_it() -> None:
    asked: list[Request] = []

    def reply(request: Request, index: int) -> str:
        asked.append(request)
        begun = request.messages[-1]["content"] if request.messages[-1]["role"] == "assistant" else ""
        lines = ["1+1=2", "2+1=3", "3+1=4", "####4"][begun.count("\n") :]
        if "9" in begun:  # what follows from the mistake
            lines = [line.replace("3+", "9+").replace("4", "10") for line in lines]
        if not request.stop and not begun:
            lines = ["1+1=2", "2+1=9", "9+1=10", "####10"]
        return lines[0] if request.stop else "\n".join(lines)

    solution = asyncio.run(ask(ScriptedBackend(reply), "ssr:steps=lines", "?"))
    assert [proposal.text.split("\n") for proposal in solution.rounds] == [
        ["1+1=2", "2+1=9", "9+1=10", "####10"],
        ["1+1=2", "2+1=3", "3+1=4", "####4"],
    ]
    assert (solution.answer, solution.stop) == ("4", "agreed")
    begun = [request for request in asked if request.messages[-1]["role"] == "assistant"]
    assert begun
    assert all(request.extra == GO_ON for request in begun)
    assert all(not request.extra for request in asked if request not in begun)


@pytest.mark.parametrize("rest", ["1+1=2", ""], ids=["begins anew", "says nothing"])
def test_a_model_that_does_not_go_on_is_flagged_and_changes_nothing(rest: str) -> None:
    def reply(request: Request, index: int) -> str:
        if request.messages[-1]["role"] == "assistant":
            return rest
        return "1+1=2" if request.stop else "1+1=2\n2+1=9\n####9"

    solution = asyncio.run(ask(ScriptedBackend(reply), "ssr:steps=lines", "?"))
    assert (solution.answer, len(solution.rounds)) == ("9", 1)
    assert any("lines not checked" in flag for flag in solution.flags)


@pytest.mark.parametrize("method", ["ssr-ada:steps=lines", "ssr-plan:steps=lines", "ssr:preset=paper,steps=lines"])
def test_lines_go_with_linear_ssr_only(method: str) -> None:
    with pytest.raises(ConfigError, match="steps=lines"):
        parse_method(method)
