"""Connections: the environment's proxies, the trusted certificates, cookies."""

from __future__ import annotations

import asyncio
import base64

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from luthier.core.errors import ConfigError
from luthier.llm import Endpoint, Request, RequestFailed
from luthier.llm.connections import open_session

ASK = Request(messages=[{"role": "user", "content": "Hello"}])
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ask(monkeypatch: pytest.MonkeyPatch, host: str, user: str = "") -> list[tuple[str, str | None]]:
    """Host and credentials of what reaches a proxy when a call goes to `host`."""
    seen: list[tuple[str, str | None]] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append((request.host, request.headers.get("Proxy-Authorization")))
        return web.json_response(ANSWER, headers={"Set-Cookie": "a=b"})

    async def main() -> None:
        async with RawTestServer(answer) as server:
            monkeypatch.setenv("http_proxy", f"http://{user}127.0.0.1:{server.port}")
            endpoint = Endpoint(f"http://{host}/v1", "m", api_key="k")
            assert (await endpoint.complete(ASK))[0].text == "Hi"
            await endpoint.aclose()

    asyncio.run(main())
    return seen


def test_the_environments_proxy_is_used_with_its_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, "api.example") == [("api.example", None)]
    token = base64.b64encode(b"me:secret").decode()
    assert ask(monkeypatch, "api.example", "me:secret@") == [("api.example", f"Basic {token}")]


@pytest.mark.parametrize("user", ["", "me:secret@"])
def test_hosts_named_in_no_proxy_are_reached_directly(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.json_response(ANSWER)

    async def main() -> str:
        async with RawTestServer(answer) as server:
            endpoint = Endpoint(f"http://{user}127.0.0.1:{server.port}/v1", "m", api_key="")
            try:
                return (await endpoint.complete(ASK))[0].text
            finally:
                await endpoint.aclose()

    assert asyncio.run(main()) == "Hi"


def test_a_proxy_that_is_none_of_http_is_an_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://me:secret@127.0.0.1:1080")

    async def main() -> None:
        await Endpoint("http://api.example/v1", "m", api_key="k").complete(ASK)

    with pytest.raises(ConfigError, match="'socks5'") as caught:
        asyncio.run(main())
    assert "secret" not in f"{caught.value}{caught.value.hint}"
    assert "no_proxy" in caught.value.hint


def test_https_that_fails_names_the_certificate_file() -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.json_response(ANSWER)

    async def main() -> None:
        async with RawTestServer(answer) as server:  # which speaks plain HTTP
            endpoint = Endpoint(f"https://127.0.0.1:{server.port}/v1", "m", api_key="k")
            try:
                await endpoint.complete(ASK)
            finally:
                await endpoint.aclose()

    with pytest.raises(RequestFailed, match="cannot be reached") as caught:
        asyncio.run(main())
    assert "SSL_CERT_FILE" in caught.value.hint


def test_cookies_are_not_kept_and_servers_are_verified() -> None:
    cookies = []

    async def answer(request: web.BaseRequest) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        return web.json_response(ANSWER, headers={"Set-Cookie": "a=b"})

    async def main() -> None:
        async with RawTestServer(answer) as server:
            endpoint = Endpoint(f"http://localhost:{server.port}/v1", "m", api_key="k")  # no cookies come from numbers
            for _ in range(2):
                await endpoint.complete(ASK)
            await endpoint.aclose()
        async with open_session("https://api.example/v1", timeout=1, connect_timeout=1) as session:
            context = session.connector._ssl  # type: ignore[union-attr]
            assert (context.check_hostname, len(context.get_ca_certs()) > 50) == (True, True)

    asyncio.run(main())
    assert cookies == [None, None]
