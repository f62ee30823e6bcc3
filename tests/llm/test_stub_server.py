"""The stub server and the client against each other: whole answers, faults, ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from luthier.core.errors import EndpointError
from luthier.llm import Completion, Endpoint, Request
from luthier.llm.stub_server import Faults, StubServer
from luthier.llm.types import Message


def echo(messages: Sequence[Message], seed: int | None, index: int) -> str:
    return f"{messages[-1]['content']} {index}"


async def soon(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.001))


def ask(faults: Faults, requests: int = 20, **options: float) -> tuple[list[list[Completion]], StubServer]:
    async def run() -> tuple[list[list[Completion]], StubServer]:
        async with StubServer(echo, faults=faults) as server:
            endpoint = Endpoint(server.url, "stub", max_retries=30, sleep=soon, **options)  # type: ignore[arg-type]
            try:
                messages = [[{"role": "user", "content": f"hello {i}"}] for i in range(requests)]
                asked = (endpoint.complete(Request(messages=one, n=2)) for one in messages)
                return await asyncio.gather(*asked), server
            finally:
                await endpoint.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(dropped=0.2),
        Faults(errors=0.2, limited=0.2, retry_after=0.001),
        Faults(truncated=0.3),
        Faults(one_choice=True),
    ],
)
def test_every_answer_arrives_whatever_goes_wrong(faults: Faults) -> None:
    answers, server = ask(faults)
    expected = [[f"hello {i} 0", f"hello {i} 0" if faults.one_choice else f"hello {i} 1"] for i in range(20)]
    assert [[completion.text for completion in one] for one in answers] == expected
    paid = sum(completion.usage.completion_tokens for one in answers for completion in one)
    # What was cut off on the way was delivered as far as the server knows.
    assert paid <= server.ledger.completion_tokens
    assert faults.truncated or paid == server.ledger.completion_tokens


def test_a_server_that_never_answers_is_an_error() -> None:
    with pytest.raises(EndpointError, match="timed out"):
        asyncio.run(_hanging())


async def _hanging() -> None:
    async with StubServer(echo, faults=Faults(hanging=1.0)) as server:
        endpoint = Endpoint(server.url, "stub", timeout=0.1, max_retries=1, sleep=soon)
        try:
            await endpoint.complete(Request(messages=[{"role": "user", "content": "hello"}]))
        finally:
            await endpoint.aclose()


def test_the_client_lists_the_models_of_the_server() -> None:
    async def run() -> list[str]:
        async with StubServer(echo, model="small") as server:
            endpoint = Endpoint(server.url, "small")
            try:
                return await endpoint.models()
            finally:
                await endpoint.aclose()

    assert asyncio.run(run()) == ["small"]
