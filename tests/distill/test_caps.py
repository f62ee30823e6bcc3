from __future__ import annotations

import asyncio

import pytest

from luthier.core.errors import ConfigError
from luthier.distill.caps import Caps, Ledger, most
from luthier.llm.prices import Prices
from luthier.llm.types import Usage


def usage(prompt: int, completion: int = 0, calls: int = 1, unreported: int = 0) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, calls=calls, unreported=unreported)


def test_the_most_that_a_request_can_cost_is_above_every_byte_level_count() -> None:
    worst = most("né", samples=2, max_tokens=10)
    assert (worst.calls, worst.completion_tokens) == (2, 20)
    assert worst.prompt_tokens >= 2 * 3
    longer = most([{"role": "system", "content": "x"}, {"role": "user", "content": "né"}], 2, 10)
    assert longer.prompt_tokens > worst.prompt_tokens


def test_nothing_is_reserved_beyond_a_cap() -> None:
    async def work() -> list[str | None]:
        ledger = Ledger(Caps(tokens=100), spent=usage(40))
        first = await ledger.reserve(usage(50, 10))
        await ledger.settle(usage(50, 10), usage(20, 5))
        return [first, await ledger.reserve(usage(30, 6)), await ledger.reserve(usage(30, 5))]

    assert asyncio.run(work()) == [None, "tokens", None]


def test_what_a_request_does_not_need_lets_a_waiting_one_go() -> None:
    async def work() -> str | None:
        ledger = Ledger(Caps(tokens=100))
        assert await ledger.reserve(usage(80)) is None
        waiting = asyncio.create_task(ledger.reserve(usage(50)))
        await asyncio.sleep(0)
        assert not waiting.done()
        await ledger.settle(usage(80), usage(50))
        return await waiting

    assert asyncio.run(work()) is None


def test_calls_and_dollars_are_capped_too() -> None:
    def price(spent: Usage) -> float | None:
        return Prices({"m": (1.0, 10.0)}).cost("m", spent)

    async def work() -> tuple[str | None, str | None]:
        dollars = Ledger(Caps(dollars=1e-4), price)
        return await dollars.reserve(usage(10, 10)), await Ledger(Caps(calls=1)).reserve(usage(1, calls=2))

    assert asyncio.run(work()) == ("dollars", "calls")
    with pytest.raises(ConfigError, match="needs the price"):
        Ledger(Caps(dollars=1.0))
    with pytest.raises(ConfigError, match="needs the price"):
        Ledger(Caps(dollars=1.0), lambda spent: Prices({}).cost("m", spent))


def test_where_the_server_tells_no_tokens_the_worst_is_booked() -> None:
    async def work() -> Usage:
        ledger = Ledger(Caps())
        await ledger.reserve(usage(50, 10))
        await ledger.settle(usage(50, 10), usage(0, 0, unreported=1))
        return ledger.spent

    assert asyncio.run(work()) == usage(50, 10)


def test_a_cap_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="cap on calls is 0"):
        Caps(calls=0)
