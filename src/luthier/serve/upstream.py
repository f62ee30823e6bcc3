"""Where the plain models are: another server, whose answers pass through as they are."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp

from luthier.llm.connections import FAILURES, open_session, reason
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
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
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
            session = self._session(decompress=True)
            endpoint = Endpoint(self.url, model, api_key=key, concurrency=self._concurrency, session=session)
        self._backends[name] = endpoint
        return endpoint

    def _session(self, *, decompress: bool) -> aiohttp.ClientSession:
        """Connections for reasoners, or for what passes through as it is."""
        if decompress not in self._sessions:
            session = open_session(self.url, timeout=self._timeout, connect_timeout=10.0, decompress=decompress)
            self._sessions[decompress] = session
        return self._sessions[decompress]

    async def forward(self, request: ChatRequest, content: bytes, headers: Mapping[str, str]) -> Plain:
        """The server's status, headers and bytes as they come. Raises: ApiError 502 or 504 when none come."""
        # Without an Accept-Encoding of the client's own, aiohttp would ask for what the client cannot read.
        sent = {"accept-encoding": "identity", **_without(NOT_FORWARDED, headers)}
        if self._key and not KEYS & sent.keys():
            sent["authorization"] = f"Bearer {self._key}"
        url, session = f"{self.url}/chat/completions", self._session(decompress=False)
        try:
            response = await session.post(url, data=content, headers=sent, allow_redirects=False)
        except FAILURES as error:
            raise self._failure(error) from error
        pieces = await begun(self._pieces(response))
        return Plain(response.status, pieces, _without(NOT_RETURNED, response.headers))

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
        """The bytes. A stream that breaks off between two events ends with an event that says so."""
        end: bytes | None = None
        try:
            async for piece in response.content.iter_any():
                yield piece
                end = piece[-4:]
        except FAILURES as error:
            failure = self._failure(error)
            if end is None:
                raise failure from error
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            if not end.endswith((b"\n\n", b"\r\n\r\n")) or "content-encoding" in response.headers:
                raise
            yield event(failure.body)
        finally:
            response.close()

    def _failure(self, error: Exception) -> ApiError:
        late = isinstance(error, aiohttp.SocketTimeoutError)
        what = "did not answer in time" if late else f"cannot be reached ({reason(error)})"
        code = "upstream_timeout" if late else "upstream_error"
        return ApiError(504 if late else 502, f"{self.url} {what}", kind="upstream_error", code=code)

    async def aclose(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()


def _without(names: set[str], headers: Mapping[str, str]) -> dict[str, str]:
    """Headers but for these, and for those that belong to the connection by its own word."""
    own = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    return {name: value for name, value in headers.items() if name.lower() not in names | own}
