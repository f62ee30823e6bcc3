from __future__ import annotations

import asyncio

import httpx
import pytest

from luthier.llm.endpoint import Endpoint
from luthier.llm.pools import CONNECTIONS, Pools, pooled
from luthier.llm.stub_server import StubServer
from luthier.llm.types import Request


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_many_connections_are_spread_and_used_again() -> None:
    async def run() -> tuple[int, list[int]]:
        async with StubServer(lambda messages, seed, index: "4", latency=0.05) as stub:
            pools = pooled(40)
            assert isinstance(pools, Pools)
            endpoint = Endpoint(stub.url, "stub", concurrency=40, transport=pools)
            question = Request(messages=[{"role": "user", "content": "2+2?"}])
            for _ in range(3):
                answers = await asyncio.gather(*(endpoint.complete(question) for _ in range(40)))
                assert {answer[0].text for answer in answers} == {"4"}
            in_flight = list(pools._in_flight)
            await endpoint.aclose()
            return stub.ledger.most_in_flight, in_flight

    most, in_flight = asyncio.run(run())
    assert most == 40
    assert in_flight == [0] * (40 // CONNECTIONS)


def test_a_failure_and_a_cancelled_call_give_their_place_back() -> None:
    async def run() -> list[int]:
        async with StubServer(lambda messages, seed, index: "4", latency=30) as stub:
            pools = Pools(2)
            client = httpx.AsyncClient(transport=pools)
            with pytest.raises(httpx.ConnectError):
                await client.get("http://127.0.0.1:9/")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.post(f"{stub.url}/chat/completions", json={"messages": []})
            await client.aclose()
            return pools._in_flight

    assert asyncio.run(run()) == [0, 0]


def test_few_connections_and_proxies_are_left_to_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pooled(CONNECTIONS) is None
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert pooled(200) is None
