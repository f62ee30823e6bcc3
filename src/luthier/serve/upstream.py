"""Where the plain models are: another server, or a model in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from luthier.llm.endpoint import Endpoint, normalize_url
from luthier.llm.types import Backend, Completion, Request
from luthier.serve.failures import ApiError
from luthier.serve.protocol import (
    READ,
    ChatRequest,
    chunk,
    completion,
    conversation,
    length,
    number,
    refuse_others,
    usage_chunk,
)
from luthier.serve.streaming import DONE, event

MOST_BACKENDS = 64
"""Connections to one server that are kept, by model and key."""
LOCAL = READ | {"top_p", "top_k", "stop"}
# Of one connection, not of the request; and what a browser tells about itself.
NOT_FORWARDED = {"host", "content-length", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization"}
NOT_FORWARDED |= {"te", "trailer", "transfer-encoding", "upgrade", "expect", "cookie", "origin", "referer"}
NOT_RETURNED = NOT_FORWARDED | {"set-cookie", "date", "server"}


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
    """Another OpenAI-compatible server. `key`: for clients that send none; `concurrency`: most calls in flight."""

    def __init__(self, url: str, *, key: str | None = None, concurrency: int = 64, timeout: float = 600.0) -> None:
        self.url = normalize_url(url)
        self._key = key
        self._concurrency = concurrency
        self._timeout = timeout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=10.0), limits=limits)
        self._backends: dict[tuple[str, str | None], Endpoint] = {}

    async def models(self, key: str | None) -> list[str]:
        """What the server lists."""
        return await self._endpoint("", key).models()

    def backend(self, model: str, key: str | None) -> Backend:
        """An endpoint with the client's key; it is kept, so that what it learned of the server is."""
        return self._endpoint(model, key)

    def _endpoint(self, model: str, key: str | None) -> Endpoint:
        name = (model, key)
        if name not in self._backends:
            if len(self._backends) >= MOST_BACKENDS:
                self._backends.pop(next(iter(self._backends)))
            self._backends[name] = Endpoint(
                self.url, model, api_key=key or self._key, concurrency=self._concurrency, timeout=self._timeout
            )
        return self._backends[name]

    async def forward(self, request: ChatRequest, content: bytes, headers: Mapping[str, str]) -> Plain:
        """The server's status, headers and bytes as they come. Raises: ApiError 502 or 504 when none come."""
        sent = {name: value for name, value in headers.items() if name not in NOT_FORWARDED}
        if self._key and "authorization" not in sent:
            sent["authorization"] = f"Bearer {self._key}"
        asked = self._client.build_request("POST", f"{self.url}/chat/completions", content=content, headers=sent)
        try:
            response = await self._client.send(asked, stream=True)
        except httpx.HTTPError as error:
            late = isinstance(error, httpx.ReadTimeout)
            reason = "did not answer in time" if late else f"cannot be reached ({str(error) or type(error).__name__})"
            raise ApiError(504 if late else 502, f"{self.url} {reason}", kind="upstream_error") from error
        kept = {name: value for name, value in response.headers.items() if name not in NOT_RETURNED}
        return Plain(response.status_code, _bytes(response), kept)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        for endpoint in self._backends.values():
            await endpoint.aclose()


async def _bytes(response: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in response.aiter_raw():
            yield piece
    finally:
        await response.aclose()


class LocalBackend(Backend, Protocol):
    """A backend in this process; `finished` gets the completion after the last piece of a stream."""

    def stream(self, request: Request, finished: Callable[[Completion], None] | None = None) -> AsyncIterator[str]:
        """The single sample of the request in pieces."""
        ...


class Local:
    """One model in this process, under a name of its own."""

    def __init__(self, backend: LocalBackend, name: str = "") -> None:
        self._backend = backend
        self._name = name or backend.model

    async def models(self, key: str | None) -> list[str]:
        """Its name."""
        return [self._name]

    def backend(self, model: str, key: str | None) -> Backend:
        """The model. Raises: ApiError 404 for another name."""
        if model != self._name:
            message = f"there is no model {model!r} here, only {self._name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._backend

    async def forward(self, request: ChatRequest, content: bytes, headers: Mapping[str, str]) -> Plain:
        """Its answer, whole or streamed. Raises: ApiError 400 for what it cannot do."""
        self.backend(request.upstream_model, None)
        refuse_others(request, LOCAL, "a model in this process cannot do this; leave it out")
        body = request.body
        temperature, top_p = number(body, "temperature"), number(body, "top_p")
        asked = Request(
            messages=conversation(body, reasoner=False),
            max_tokens=length(body),
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=max(int(number(body, "top_k") or 0), 0),
            stop=body.get("stop") or (),
            seed=request.seed,
        )
        if request.stream:
            return Plain(200, self._pieces(request, asked), {"content-type": "text/event-stream"})
        (reply,) = await self._backend.complete(asked)
        answer = completion(request, {0: (reply.text, reply.finish_reason)}, reply.usage)
        return Plain(200, _once(json.dumps(answer).encode()), {"content-type": "application/json"})

    async def _pieces(self, request: ChatRequest, asked: Request) -> AsyncIterator[bytes]:
        done: list[Completion] = []
        yield event(chunk(request, {"role": "assistant", "content": ""}))
        async for piece in self._backend.stream(asked, done.append):
            yield event(chunk(request, {"content": piece}))
        yield event(chunk(request, {}, done[0].finish_reason))
        if request.include_usage:
            yield event(usage_chunk(request, done[0].usage))
        yield DONE

    async def aclose(self) -> None:
        """Stop the model's thread."""
        await self._backend.aclose()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
