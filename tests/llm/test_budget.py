from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError
from luthier.llm import CachedBackend, Completion, Request, RequestFailed, ScriptedBackend, Usage
from luthier.llm.budget import BudgetedBackend, BudgetSpent

PRICES = {"scripted": (1.0, 10.0)}


def price(model: str, usage: Usage) -> float | None:
    """Dollars per token."""
    if model not in PRICES or usage.unreported:
        return None
    return usage.prompt_tokens * PRICES[model][0] + usage.completion_tokens * PRICES[model][1]


def ask(number: int, **how: Any) -> Request:
    return Request(prompt=f"{number}", **{"max_tokens": 5, **how})


def ask_all(backend: Any, requests: list[Request]) -> list[Any]:
    async def work() -> list[Any]:
        return await asyncio.gather(*map(backend.complete, requests), return_exceptions=True)

    return asyncio.run(work())


@pytest.mark.parametrize("at_once", [1, 20])
@pytest.mark.parametrize(
    ("limits", "answered"),
    [
        ({"max_calls": 7}, 7),
        ({"max_tokens": 18}, 7),  # each has 2 tokens; the eighth might have 5, and 14 + 5 > 18
        ({"max_cost": 100.0, "price": price}, 2),  # each costs 1 + 2 · 10; it might cost 17 or 18 + 5 · 10
        ({}, 20),
    ],
)
def test_a_limit_is_reached_as_far_as_possible_and_never_passed(
    limits: dict[str, Any], answered: int, at_once: int
) -> None:
    inner = ScriptedBackend(lambda request, index: "two words", delay=0.001)
    backend = BudgetedBackend(inner, **limits)

    async def work() -> list[Any]:
        slots = asyncio.Semaphore(at_once)

        async def one(request: Request) -> Any:
            async with slots:
                return await backend.complete(request)

        return await asyncio.gather(*(one(ask(n)) for n in range(20)), return_exceptions=True)

    results = asyncio.run(work())
    assert sum(isinstance(result, list) for result in results) == answered == len(inner.requests)
    assert all(isinstance(result, BudgetSpent) for result in results if not isinstance(result, list))
    assert backend.spent == inner.usage == backend.usage


def test_what_a_store_holds_is_free_but_counts(tmp_path: Path) -> None:
    for number, expected in ((0, 3), (1, 0), (2, 2)):
        inner = ScriptedBackend(lambda request, index: "two words")
        budget = BudgetedBackend(inner, max_calls=5 if number == 2 else 3)
        cached = CachedBackend(budget, tmp_path / "c.db")
        budget.spent = cached.stored()
        ask_all(cached, [ask(n) for n in range(8)])
        assert len(inner.requests) == expected
    assert cached.stored() == Usage(prompt_tokens=5, completion_tokens=10, calls=5)


def test_a_server_that_tells_nothing_is_charged_the_most() -> None:
    silent = Completion(text="x", finish_reason="stop", usage=Usage(calls=1, unreported=1))
    backend = BudgetedBackend(ScriptedBackend(lambda request, index: silent), max_tokens=11)
    results = ask_all(backend, [ask(n) for n in range(4)])
    assert [isinstance(result, list) for result in results] == [True, True, False, False]


def test_failures_cost_what_they_delivered_and_free_their_share() -> None:
    paid = Completion(text="x", finish_reason="stop", usage=Usage(completion_tokens=3, calls=1))
    failure = RequestFailed("half", hint="again", completions=(paid,))
    backend = BudgetedBackend(ScriptedBackend([failure, "ok", "ok"]), max_tokens=8)

    async def work() -> None:
        with pytest.raises(RequestFailed):
            await backend.complete(ask(1))
        assert backend.spent.completion_tokens == 3
        await backend.complete(ask(2))
        with pytest.raises(BudgetSpent):
            await backend.complete(ask(3))

    asyncio.run(work())


def test_limits_that_cannot_be_kept_are_refused() -> None:
    inner = ScriptedBackend(["x"], model="other")
    for prices in (None, price):
        with pytest.raises(ConfigError, match="price of 'other' is unknown"):
            BudgetedBackend(inner, max_cost=1.0, price=prices)
    (error,) = ask_all(BudgetedBackend(inner, max_tokens=9), [ask(1, max_tokens=None)])
    assert isinstance(error, ConfigError)
    assert asyncio.run(BudgetedBackend(inner, max_calls=1).complete(ask(1, max_tokens=None)))[0].text == "x"
