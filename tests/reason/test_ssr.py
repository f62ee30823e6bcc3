"""The algorithm on a solver with known habits: sequences, counts, closed forms, faults."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from typing import Any, get_args

import pytest

from luthier.core.errors import ConfigError, EndpointError
from luthier.llm import ScriptedBackend
from luthier.llm.types import Completion, Request
from luthier.reason.config import Method
from luthier.reason.methods import METHODS, parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver, chance_of_chain, guarded_patch, plurality
from luthier.reason.trace import Trace

SURE = Habits(error=0.0, judge_imagines=0.0, judge_finds=1.0)


async def equal(a: str, b: str) -> bool:
    return a == b


def ask(backend: Any, method: str, chain: Chain, seed: int = 0, **more: Any) -> Solution:
    return asyncio.run(
        solve(chain.question, Models(backend), parse_method(method), equivalence=equal, seed=seed, **more)
    )


def accuracy(method: str, habits: Habits, length: int, n: int) -> float:
    async def run() -> float:
        backend, config = SimulatedSolver(habits), parse_method(method)
        chains = [Chain.draw(length, index) for index in range(n)]
        solutions = [
            await solve(chain.question, Models(backend), config, equivalence=equal, seed=seed)
            for seed, chain in enumerate(chains)
        ]
        return sum(s.answer == c.answer for s, c in zip(solutions, chains, strict=True)) / n

    return asyncio.run(run())


def within(measured: float, expected: float, n: int) -> bool:
    """Inside four standard errors."""
    return abs(measured - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 1 / n) / n)


@pytest.mark.parametrize(("length", "rounds"), [(4, 3), (8, 3), (3, 1)])
def test_as_published_the_calls_are_counted_as_published(length: int, rounds: int) -> None:
    solution = ask(SimulatedSolver(SURE), f"ssr-lin:preset=paper,rounds={rounds}", Chain.draw(length, 1))
    # Everything is confident here: each of the R + 2 passes also calls the judge.
    assert solution.usage.calls == 1 + (rounds + 2) * (1 + 2 * length) + (rounds + 1) + (rounds + 2)


def test_as_published_a_doubted_step_costs_no_judge() -> None:
    solution = ask(SimulatedSolver(Habits(error=0.95)), "ssr-lin:preset=paper", Chain.draw(4, 1))
    assert solution.usage.calls == 50
    assert [proposal.round for proposal in solution.rounds] == [0, 1, 2, 3, 4]


def test_a_judge_that_is_never_content_keeps_ssr_ada_at_ten_calls() -> None:
    habits = Habits(error=0.0, judge_imagines=1.0)
    assert ask(SimulatedSolver(habits), "ssr-ada:preset=paper", Chain.draw(4, 1)).usage.calls == 10


def test_ours_stops_when_no_step_is_outvoted() -> None:
    solution = ask(SimulatedSolver(SURE), "ssr", Chain.draw(4, 1))
    assert (solution.stop, solution.usage.calls) == ("agreed", 1 + 1 + 4)
    assert all(step.agrees and step.confidence == 1.0 for step in solution.steps)


@pytest.mark.parametrize(
    ("method", "calls"),
    [("cot", 1), ("maj", 1), ("best-of-n", 6), ("self-refine:reference_compat=true", 7), ("debate", 7)],
)
def test_calls_of_the_baselines(method: str, calls: int) -> None:
    replies = ["<answer>2</answer>"]
    backend = ScriptedBackend(lambda request, index: replies[0])
    assert ask(backend, method, Chain.draw(2, 0)).usage.calls == calls


def test_atom_of_thoughts_and_tree_search_cost_what_was_published() -> None:
    def reply(request: Request, index: int) -> str:
        said = request.messages[-1]["content"]
        if '"depends"' in said:
            steps = [{"question": "a", "answer": "1", "depends": []}, {"question": "b", "answer": "2", "depends": [0]}]
            return json.dumps({"steps": steps})
        return "<question>simpler</question> <answer>50</answer>"

    assert ask(ScriptedBackend(reply), "atom", Chain.draw(2, 0)).usage.calls == 12
    assert ask(ScriptedBackend(reply), "mctsr:reference_compat=true", Chain.draw(2, 0)).usage.calls == 19
    ensemble = ScriptedBackend(reply)
    ask(ensemble, "atom", Chain.draw(2, 0))
    assert Chain.draw(2, 0).question in ensemble.requests[-1].messages[-1]["content"]  # the original question


@pytest.mark.parametrize(
    ("method", "habits", "expected"),
    [
        ("cot", Habits(error=0.2), chance_of_chain(6, Habits(error=0.2))),
        ("ssr-lin:fix=first,rounds=2,min_votes=1", Habits(error=0.2), guarded_patch(6, 2, 0.2, plurality(5, 0.2, 8))),
    ],
)
def test_closed_forms(method: str, habits: Habits, expected: float) -> None:
    assert within(accuracy(method, habits, 6, 250), expected, 250)


def test_verification_that_knows_nothing_gains_nothing() -> None:
    """A gain here would mean that the answer leaks from somewhere."""
    habits = Habits(error=0.2, blind=True)
    assert within(accuracy("ssr", habits, 4, 300), chance_of_chain(4, habits), 300)


def test_repeated_runs_are_equal_and_seeds_matter() -> None:
    chain, backend = Chain.draw(6, 3), SimulatedSolver(Habits(error=0.3))
    runs = [dataclasses.replace(ask(backend, "ssr", chain, seed), seconds=0) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_failing_model_is_an_error_and_never_an_answer() -> None:
    def reply(request: Request, index: int) -> str | Exception:
        return "v1 = 1\n<answer>1</answer>" if len(backend.requests) == 1 else EndpointError("down", hint="wait")

    backend = ScriptedBackend(reply)
    with pytest.raises(EndpointError, match="down"):
        ask(backend, "ssr", Chain.draw(2, 0))


def test_what_cannot_be_decomposed_is_judged_and_flagged() -> None:
    def reply(request: Request, index: int) -> str:
        return "<answer>5</answer>"

    solution = ask(ScriptedBackend(reply), "ssr", Chain.draw(2, 0))
    assert solution.answer == "5"
    assert any("no readable decomposition" in flag for flag in solution.flags)
    assert solution.usage.calls == 1 + 2 + 1  # solve, decompose and repair, judge (content: 5)


@pytest.mark.parametrize(
    ("budget", "calls"), [("max_calls=3", 3), ("max_tokens_total=30", None), ("max_seconds=0.05", None)]
)
def test_a_spent_budget_gives_the_answer_so_far(budget: str, calls: int | None) -> None:
    backend = Slow(Habits(error=0.5)) if "seconds" in budget else SimulatedSolver(Habits(error=0.5))
    solution = ask(backend, f"ssr:{budget}", Chain.draw(8, 1))
    assert solution.stop == "budget"
    assert calls is None or solution.usage.calls == calls  # also the one that was on its way


def test_what_a_budget_cut_off_was_paid_for_and_is_counted() -> None:
    backend = Slow(Habits(error=0.5))
    solution = ask(backend, "ssr:max_calls=5", Chain.draw(8, 1))
    assert (solution.stop, solution.usage.calls) == ("budget", 5)
    assert solution.usage == backend.usage


class Slow(SimulatedSolver):
    async def complete(self, request: Request) -> list[Completion]:
        await asyncio.sleep(0.02)
        return await super().complete(request)


def test_cancelling_cancels_every_call() -> None:
    async def run() -> int:
        work = asyncio.ensure_future(solve("2+2?", Models(backend), parse_method("best-of-n@4"), equivalence=equal))
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return backend.in_flight

    backend = ScriptedBackend(lambda request, index: "<answer>4</answer>", delay=10.0)
    assert asyncio.run(run()) == 0


def test_the_conversation_before_the_question_is_kept() -> None:
    backend = ScriptedBackend(["<answer>4</answer>"])
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    asyncio.run(solve(turns, Models(backend), parse_method("cot"), equivalence=equal))
    assert backend.requests[0].messages[0] == turns[0]
    with pytest.raises(ConfigError, match="user's message"):
        asyncio.run(solve(turns[:1], Models(backend), parse_method("cot"), equivalence=equal))


def test_roles_go_to_their_models() -> None:
    solver, other = SimulatedSolver(Habits(error=0.5)), SimulatedSolver(SURE)
    models = Models(solver, {"step": other, "decompose": other})
    chain = Chain.draw(6, 4)
    solution = asyncio.run(solve(chain.question, models, parse_method("ssr"), equivalence=equal))
    assert solution.answer == chain.answer  # a sure verifier mends an unsure solver
    assert other.usage.calls > solver.usage.calls


def test_a_checker_decides_without_calls() -> None:
    def reply(request: Request, index: int) -> str:
        said = request.messages[-1]["content"]
        if "JSON only" in said:
            return '{"steps": [{"question": "What is 17 + 25?", "answer": "41"}]}'
        return "17 + 25 = 42 <answer>42</answer>" if len(request.messages) > 1 else "it is <answer>41</answer>"

    solution = ask(ScriptedBackend(reply), "ssr:checkers=[arithmetic],rounds=1", Chain.draw(2, 0))
    assert (solution.answer, solution.usage.calls) == ("42", 3)
    assert solution.steps[0].decided_by == "checker"


def test_unchanged_steps_keep_their_votes() -> None:
    habits = Habits(error=0.3)
    chain = Chain.draw(12, 5)
    fresh, kept = (
        ask(SimulatedSolver(habits), f"ssr:fix=first,reuse_votes={word}", chain).usage.calls
        for word in ("false", "true")
    )
    assert kept < fresh


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("maj@16", "votes", 16),
        ("ssr-plan:rounds=5,samples=3", "samples", 3),
        ("ssr-lin:preset=paper", "guard", False),
        ("ssr:checkers=[arithmetic,sudoku],rounds=1", "checkers", ("arithmetic", "sudoku")),
    ],
)
def test_methods_are_named_with_their_settings(text: str, field: str, value: object) -> None:
    assert getattr(parse_method(text), field) == value


@pytest.mark.parametrize("text", ["srs", "ssr:round=1", "ssr:rounds=x", "ssr:rounds=-1", "", "ssr:checkers=[chess]"])
def test_what_is_no_method_is_said(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_method(text)


def test_every_method_has_a_name_in_the_config() -> None:
    assert set(METHODS) == set(get_args(Method))
    for name in METHODS:
        assert parse_method(name).method == name


def test_traces_are_trees_whose_spans_end() -> None:
    events: list[Any] = []
    ask(SimulatedSolver(Habits(error=0.5)), "ssr", Chain.draw(4, 2), trace=Trace("p", (events.append,)))
    started = {event["span"]: event for event in events if event["event"] == "start"}
    ended = [event["span"] for event in events if event["event"] == "end"]
    assert sorted(ended) == sorted(started)
    roots = [span for span in started.values() if span["parent"] is None]
    assert [root["kind"] for root in roots] == ["problem"]
    assert all(span["parent"] in started for span in started.values() if span["parent"] is not None)
    assert {"proposal", "steps", "selected"} <= {event["name"] for event in events if event["event"] == "point"}
