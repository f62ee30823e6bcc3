"""A plain model in this process, as an upstream of the proxy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from luthier.llm.types import GO_ON, Backend, Completion, Request, Usage
from luthier.serve.answers import chunk, completion, encoded, event, usage_chunk
from luthier.serve.failures import ApiError, error_of
from luthier.serve.protocol import (
    READ,
    ChatRequest,
    conversation,
    integer,
    length,
    number,
    refuse_others,
    strings,
)
from luthier.serve.streaming import DONE, begun
from luthier.serve.upstream import Plain

KNOWN = READ | {"top_p", "top_k", "stop", *GO_ON}
MOST_SAMPLES = 128  # OpenAI's own limit of n


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
        asked = _read(request)
        if request.stream:
            return Plain(200, await begun(self._pieces(request, asked)), {"content-type": "text/event-stream"})
        replies = await self._backend.complete(asked)
        texts = {index: (reply.text, reply.finish_reason) for index, reply in enumerate(replies)}
        answer = completion(request, texts, sum((reply.usage for reply in replies), Usage()))
        return Plain(200, _once(encoded(answer)), {"content-type": "application/json"})

    async def _pieces(self, request: ChatRequest, asked: Request) -> AsyncGenerator[bytes]:
        done: list[Completion] = []
        start = event(chunk(request, {"role": "assistant", "content": ""}))
        try:
            async for piece in self._backend.stream(asked, done.append):
                yield start + event(chunk(request, {"content": piece}))
                start = b""
        except Exception as error:
            if start:
                raise  # nothing is sent yet: the status can tell
            yield event(error_of(error).body)
            return
        yield start + event(chunk(request, {}, done[0].finish_reason))
        if request.include_usage:
            yield event(usage_chunk(request, done[0].usage))
        yield DONE

    async def aclose(self) -> None:
        """Stop the model's thread."""
        await self._backend.aclose()


def _read(request: ChatRequest) -> Request:
    """The request as the backend takes it. Raises: ApiError 400, ConfigError."""
    body = request.body
    known = KNOWN if request.stream else KNOWN | {"n"}
    refuse_others(request, known, "a model in this process cannot do this; leave it out")
    samples, top_k = integer(body, "n"), integer(body, "top_k")
    temperature, top_p = number(body, "temperature"), number(body, "top_p")
    if samples is not None and samples > MOST_SAMPLES:
        raise ApiError(400, f"n: got {samples}, expected at most {MOST_SAMPLES}", param="n")
    return Request(
        messages=conversation(body, reasoner=False),
        n=1 if samples is None else samples,
        max_tokens=length(body),
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(top_k or 0, 0),
        stop=strings(body, "stop"),
        seed=request.seed,
        extra=_going_on(body),
    )


def _going_on(body: Mapping[str, Any]) -> Mapping[str, bool]:
    """Whether the assistant's last message is gone on with, in vLLM's words. Raises: ApiError 400."""
    going_on = body.get("continue_final_message") or False
    cue = body.get("add_generation_prompt")
    if not isinstance(going_on, bool) or (cue is not None and cue is not (not going_on)):
        message = (
            f"continue_final_message: got {going_on!r} with add_generation_prompt={cue!r}, expected one of the two"
        )
        raise ApiError(400, message, param="continue_final_message")
    return GO_ON if going_on else {}


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
