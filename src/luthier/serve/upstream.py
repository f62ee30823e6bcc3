"""Where the plain models are: another server, whose answers pass through as they are."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from luthier.llm.endpoint import Endpoint, normalize_url
from luthier.llm.types import Backend
from luthier.serve.answers import event
from luthier.serve.failures import ApiError
from luthier.serve.protocol import ChatRequest
from luthier.serve.streaming import begun

MOST_BACKENDS = 64
"""Connections to one server that are kept, by model and key."""
KEYS = {"authorization", "api-key", "x-api-key"}
# Of one connection, not of the request; and what a browser tells about itself.
NOT_FORWARDED = {"host", "content-length", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization"}
NOT_FORWARDED |= {"te", "trailer", "transfer-encoding", "upgrade", "expect", "cookie", "origin", "referer"}
# What the other server allows to web pages is not allowed to use this one.
NOT_RETURNED = NOT_FORWARDED | {"set-cookie", "date", "server", "alt-svc", "strict-transport-security"}
NOT_RETURNED |= {f"access-control-allow-{what}" for what in ("origin", "credentials", "headers", "methods")}


@dataclass(frozen=True)
class Plain:
    """An answer of a plain model on its way to the client."""

    status: int
    content: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class Upstream(Protocol):
    """Plain models for the proxy."""

    async def models(self, key: str | None) -> list[str]:
        """Their names."""
        ...

    def backend(self, model: str, key: str | None) -> Backend:
        """A backend for the calls of a reasoner; `key` is the client's."""
        ...

    async def forward(self, request: ChatRequest, content: bytes, headers: Mapping[str, str]) -> Plain:
        """The plain model's own answer to a body with a client's headers (names in lower case)."""
        ...

    async def aclose(self) -> None:
        """Release connections."""
        ...


class Server:
    """Another OpenAI-compatible server. `key`: for clients that send none; `concurrency`: most calls in flight of
    reasoners with one model and key."""

    def __init__(self, url: str, *, key: str | None = None, concurrency: int = 64, timeout: float = 600.0) -> None:
        self.url = normalize_url(url)
        self._key = key or ""
        self._concurrency = concurrency
        self._timeout = timeout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=10.0, pool=None), limits=limits)
        self._backends: dict[tuple[str, str | None], Endpoint] = {}

    async def models(self, key: str | None) -> list[str]:
        """What the server lists."""
        return await self._endpoint("", key).models()

    def backend(self, model: str, key: str | None) -> Backend:
        """An endpoint with the client's key; it is kept, so that what it learned of the server is."""
        return self._endpoint(model, key)

    def _endpoint(self, model: str, key: str | None) -> Endpoint:
        name = (model, key)
        endpoint = self._backends.pop(name, None)
        if endpoint is None:
            if len(self._backends) >= MOST_BACKENDS:
                self._backends.pop(next(iter(self._backends)))  # the one not used for longest; calls may be in flight
            # '' and not None, which would take OPENAI_API_KEY from the environment.
            key = key or self._key
            endpoint = Endpoint(self.url, model, api_key=key, concurrency=self._concurrency, timeout=self._timeout)
        self._backends[name] = endpoint
        return endpoint

    async def forward(self, request: ChatRequest, content: bytes, headers: Mapping[str, str]) -> Plain:
        """The server's status, headers and bytes as they come. Raises: ApiError 502 or 504 when none come."""
        # Without an Accept-Encoding of the client's own, httpx would ask for what the client cannot read.
        sent = {"accept-encoding": "identity", **_without(NOT_FORWARDED, headers)}
        if self._key and not KEYS & sent.keys():
            sent["authorization"] = f"Bearer {self._key}"
        asked = self._client.build_request("POST", f"{self.url}/chat/completions", content=content, headers=sent)
        try:
            response = await self._client.send(asked, stream=True)
        except httpx.HTTPError as error:
            raise self._failure(error) from error
        pieces = await begun(self._pieces(response))
        return Plain(response.status_code, pieces, _without(NOT_RETURNED, response.headers))

    async def _pieces(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        """The bytes. A stream that breaks off between two events ends with an event that says so."""
        end: bytes | None = None
        try:
            async for piece in response.aiter_raw():
                yield piece
                end = piece[-4:]
        except httpx.HTTPError as error:
            failure = self._failure(error)
            if end is None:
                raise failure from error
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            if not end.endswith((b"\n\n", b"\r\n\r\n")) or "content-encoding" in response.headers:
                raise
            yield event(failure.body)
        finally:
            await response.aclose()

    def _failure(self, error: httpx.HTTPError) -> ApiError:
        late = isinstance(error, httpx.ReadTimeout)
        reason = "did not answer in time" if late else f"cannot be reached ({str(error) or type(error).__name__})"
        code = "upstream_timeout" if late else "upstream_error"
        return ApiError(504 if late else 502, f"{self.url} {reason}", kind="upstream_error", code=code)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        for endpoint in self._backends.values():
            await endpoint.aclose()


def _without(names: set[str], headers: Mapping[str, str]) -> dict[str, str]:
    """Headers but for these, and for those that belong to the connection by its own word."""
    own = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    return {name: value for name, value in headers.items() if name not in names | own}
