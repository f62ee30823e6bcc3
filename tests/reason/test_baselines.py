"""The baselines: requests and generations as published under `reference_compat`, and each published fault mended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from luthier.core.errors import ConfigError
from luthier.llm import ScriptedBackend
from luthier.llm.types import Request, Usage
from luthier.reason.methods import METHODS, parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.tasks.answers import same_quick

Reply = Callable[[Request, int], str]
QUESTION = "What is 2 + 2?"
HALVES = ["3", "1/2", "0.5", r"\frac{1}{2}", "3"]
"""In three spellings the most common value, and in one spelling the most common string."""


async def equal(a: str, b: str) -> bool:
    return same_quick(a, b) is True


def ask(method: str, reply: Reply | Sequence[str], question: str = QUESTION, **more: Any) -> tuple[Solution, Any]:
    backend = ScriptedBackend(reply)
    config = parse_method(method)
    return asyncio.run(solve(question, Models(backend), config, equivalence=equal, **more)), backend


def tagged(text: object) -> str:
    return f"<answer>{text}</answer>"


def always(text: object) -> Reply:
    return lambda request, index: tagged(text)


def said(request: Request) -> str:
    return "\n".join(message["content"] for message in request.messages)


def atoms(request: Request, index: int) -> str:
    """Answers a decomposition with dependencies, a contraction and everything else."""
    if '"depends"' in said(request):
        steps = [{"question": "a", "answer": "1", "depends": []}, {"question": "b", "answer": "2", "depends": [0]}]
        return json.dumps({"steps": steps})
    return "<question>a simpler one</question> <answer>50</answer>"


def socratic(request: Request, index: int) -> str:
    """Four steps, of which the last is doubted; judges are content."""
    text = request.messages[-1]["content"]
    if "JSON only" in text:
        return json.dumps({"steps": [{"question": f"q{i}", "answer": str(i)} for i in range(1, 5)]})
    if "take what is already established" in text:
        return tagged("7")
    if "<references>" in text:
        return tagged("1")
    if "<summary>" in text:
        return "<summary>plan</summary><evaluation>fine</evaluation><score>4</score>"
    return tagged("5" if "Check this solution" in text else "4")


@pytest.mark.parametrize(
    ("method", "reply", "requests", "generations"),
    [
        ("cot", always(4), 1, 1),
        ("maj@5", always(4), 1, 5),
        ("best-of-n@5", always(4), 6, 10),
        ("self-refine", always(5), 7, 7),
        ("debate", always(4), 8, 8),
        ("atom", atoms, 12, 12),
        ("mctsr", always(50), 19, 19),
        ("ssr-lin:preset=paper", socratic, 50, 130),
        ("ssr-ada:preset=paper", socratic, 55, 135),
        ("ssr-plan:preset=paper", socratic, 58, 138),
    ],
)
def test_requests_and_generations_are_the_published_ones(
    method: str, reply: Reply, requests: int, generations: int
) -> None:
    colon = "," if ":" in method else ":"
    solution, backend = ask(f"{method}{colon}reference_compat=true", reply)
    assert (solution.usage.calls, sum(request.n for request in backend.requests)) == (requests, generations)


def test_a_majority_counts_meanings_and_as_published_spellings() -> None:
    assert ask("maj@5", [tagged(text) for text in HALVES])[0].answer == "1/2"
    assert ask("maj@5:reference_compat=true", [tagged(text) for text in HALVES])[0].answer == "3"
    unread = ["?", "?", "?", tagged(1), "?"]
    for method in ("maj@5", "maj@5:reference_compat=true"):
        assert ask(method, unread)[0].answer == "1"  # what was not read has no vote
        nothing = ask(method, ["?"] * 5)[0]
        assert (nothing.answer, nothing.stop) == (None, "no answer")


def test_best_of_n_takes_the_judges_choice_then_the_most_common() -> None:
    def judged(scores: dict[str, int]) -> Reply:
        def reply(request: Request, index: int) -> str:
            if "Check this solution" not in said(request):
                return tagged(HALVES[index])
            return tagged(next(score for text, score in scores.items() if f"<answer>{text}<" in said(request)))

        return reply

    assert ask("best-of-n@5", judged({"3": 2, "1/2": 2, "0.5": 4, r"\frac{1}{2}": 2}))[0].answer == "0.5"
    assert ask("best-of-n@5", judged(dict.fromkeys(HALVES, 3)))[0].answer == "1/2"


def test_self_refine_stops_when_the_judge_is_content() -> None:
    solution, _ = ask("self-refine", always(5))
    assert (solution.usage.calls, solution.stop) == (2, "agreed")
    assert ask("self-refine", always(4))[0].usage.calls == 7


def test_debaters_vote_and_as_published_one_is_drawn() -> None:
    def reply(request: Request, index: int) -> str:
        own = request.messages[-1]["content"]
        return tagged(1 if "<own>" in own and "1" in own.split("<own>")[1].split("</own>")[0] else index and 2)

    def first(seed: int, method: str) -> str | None:
        return ask(method, lambda request, index: tagged(index % 3 and 7), seed=seed)[0].answer

    # Two of three say 7 in the first round; nothing changes without rounds.
    assert {first(seed, "debate:agents=3,rounds=0") for seed in range(4)} == {"7"}
    solution, backend = ask("debate:agents=3,rounds=2", reply)
    assert solution.usage.calls == 1 + 3 * 2
    shown = said(backend.requests[1])
    assert shown.count("<solution>\n") == 2  # the others', and its own apart
    drawn = [
        ask("debate:reference_compat=true,agents=4,rounds=0", _by_seed(), seed=seed)[0].answer for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]  # drawn with a seed


def _by_seed() -> Reply:
    return lambda request, index: tagged(request.seed)


def test_atom_of_thoughts_ends_with_the_original_question() -> None:
    for method, original in (("atom", True), ("atom:reference_compat=true", False)):
        _, backend = ask(method, atoms)
        assert (QUESTION in said(backend.requests[-1])) is original
        assert "a simpler one" in said(backend.requests[3])  # the contraction takes the question's place


def test_tree_search_shows_the_answer_that_is_refined() -> None:
    def reply(request: Request, index: int) -> str:
        if "certainly right" in said(request) or "0 to 100" in said(request):
            return tagged(50)
        return "weak" if "Do not solve" in said(request) else f"a solution {tagged(4)}"

    for method, shown, dummy in (("mctsr", True, False), ("mctsr:reference_compat=true", False, True)):
        _, backend = ask(method, reply)
        refining = [said(request) for request in backend.requests if "<review>" in said(request)]
        assert len(refining) == 4
        assert any("I don't know." in said(request) for request in backend.requests) is dummy
        real = [text for text in refining if "I don't know." not in text]
        assert all(("a solution" in text) is shown for text in real)


def test_the_published_dummy_may_win_and_ours_cannot() -> None:
    def reply(request: Request, index: int) -> str:
        if "0 to 100" in said(request):
            return tagged(90 if "I don't know." in said(request) else 10)
        return tagged(4)

    assert ask("mctsr:reference_compat=true", reply)[0].answer is None
    assert ask("mctsr", reply)[0].answer == "4"


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_a_budget_of_calls_is_kept_by_every_method_and_gives_an_answer(method: str, most: int) -> None:
    backend = SimulatedSolver(Habits(error=0.5, judge_imagines=1.0, judge_finds=1.0))
    reply: Any = backend if method in ("ssr", "ssr-lin", "ssr-ada", "self-refine") else ScriptedBackend(atoms)
    config = parse_method(f"{method}:max_calls={most}")
    solution = asyncio.run(solve(Chain.draw(6, 1).question, Models(reply), config, equivalence=equal))
    assert solution.usage.calls <= most
    assert solution.answer is not None


def test_a_budget_of_money_ends_the_work_with_the_answer_so_far() -> None:
    def price(model: str, usage: Usage) -> float | None:
        return 0.01 * usage.calls

    chain, backend = Chain.draw(6, 1), SimulatedSolver(Habits(error=0.5))
    config = parse_method("ssr:max_cost=0.045")
    solution = asyncio.run(solve(chain.question, Models(backend, price=price), config, equivalence=equal))
    assert (solution.stop, solution.usage.calls) == ("budget", 5)  # six steps are asked at once, after two calls
    assert solution.answer is not None
    assert solution.cost == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="max_cost needs the price"):
        asyncio.run(solve(chain.question, Models(backend), config, equivalence=equal))
    unknown = Models(backend, price=lambda model, usage: None)
    with pytest.raises(ConfigError, match="price of 'simulated' is unknown"):
        asyncio.run(solve(chain.question, unknown, config, equivalence=equal))


def test_a_budget_of_tokens_limits_every_reply_and_is_kept_by_steps_that_are_asked_at_once() -> None:
    solution, backend = ask("self-refine:max_tokens_total=4,max_tokens=20", always(3))  # a reply is a word here
    assert [request.max_tokens for request in backend.requests] == [4, 3, 2, 1]
    assert (solution.stop, solution.answer) == ("budget", "3")
    _, several = ask("maj@3:max_tokens_total=10", always(3))
    assert several.requests[0].max_tokens == 3
    chain, solver = Chain.draw(20, 1), SimulatedSolver(Habits(error=0.2))
    for most in (230, 400, 800):
        config = parse_method(f"ssr:max_tokens_total={most}")
        solution = asyncio.run(solve(chain.question, Models(solver), config, equivalence=equal))
        assert solution.usage.completion_tokens <= most + 5  # the simulated solver does not cut its replies short
        assert solution.answer is not None


def test_every_request_is_sampled_as_the_method_says() -> None:
    _, backend = ask("maj@3:temperature=0.6,top_p=0.95", always(4))
    assert {(request.temperature, request.top_p) for request in backend.requests} == {(0.6, 0.95)}
    _, usual = ask("cot", always(4))
    assert usual.requests[0].top_p == 1.0
    with pytest.raises(ConfigError, match=r"top_p is 0.0, expected a probability in \(0, 1\]"):
        parse_method("cot:top_p=0.0")
