"""The proxy's paths: /v1/chat/completions, /v1/models, /health.

`ssr-ada/MODEL` and every other method before a model's name reasons with that model; a plain name passes through. A
client that leaves cancels everything that was asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from luthier.llm.types import RequestFailed
from luthier.reason.methods import METHODS, solve
from luthier.reason.session import Models, Price, Solution
from luthier.reason.trace import Trace
from luthier.serve.answers import completion, cut_short, encoded, extension, finish_reason
from luthier.serve.failures import ApiError, error_of
from luthier.serve.protocol import ChatRequest, conversation, looks_like_method, read_request, settings
from luthier.serve.streaming import Listener, answer_events, begun
from luthier.serve.upstream import Upstream
from luthier.tasks.grading import Grader

CLIENT_GONE = 499
NO_LIST = (404, 405, 501)
"""A server's answers to /models when it has no list of them."""
Solve = Callable[..., Awaitable[Solution]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the proxy behaves. `limits`: budgets of every request, as fields of `ReasonConfig`; `alive_every`: seconds
    between signs of life in a stream."""

    tools: Literal["refuse", "pass"] = "refuse"
    limits: Mapping[str, float | None] = field(default_factory=dict)
    alive_every: float = 5.0
    price: Price | None = None
    listeners: tuple[Listener, ...] = ()


def create_app(upstream: Upstream, options: Settings = Settings(), solve: Solve = solve) -> FastAPI:
    """The server, as an ASGI application. It closes `upstream` when it ends."""
    grader = Grader()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await grader.aclose()
            await upstream.aclose()

    app = FastAPI(title="luthier", lifespan=lifespan, docs_url=None, redoc_url=None)
    proxy = _Proxy(upstream, options, solve, grader)
    app.add_api_route("/health", proxy.health, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", proxy.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", proxy.chat, methods=["POST"], response_model=None)
    for status in (404, 405):
        app.add_exception_handler(status, _no_such_path)
    return app


async def _no_such_path(request: Request, error: Exception) -> Response:
    paths = "POST /v1/chat/completions, GET /v1/models and GET /health"
    return ApiError(404, f"there is no {request.method} {request.url.path} here, only {paths}").response()


class _Proxy:
    def __init__(self, upstream: Upstream, options: Settings, solve: Solve, grader: Grader) -> None:
        self.upstream, self.options, self.solve, self.grader = upstream, options, solve, grader

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def models(self, http: Request) -> Response:
        try:
            names = await self.upstream.models(_key(http))
        except Exception as error:
            return error_of(error).response()
        listed = [*names, *(f"{method}/{name}" for name in names for method in METHODS)]
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "luthier"} for name in listed]
        return JSONResponse({"object": "list", "data": entries})

    async def chat(self, http: Request) -> Response:
        try:
            request = read_request(await http.body())
            answer = await _unless_gone(self._answer(request, http), http)
        except Exception as error:
            return error_of(error).response()
        return Response(status_code=CLIENT_GONE) if answer is None else answer

    async def _answer(self, request: ChatRequest, http: Request) -> Response:
        if request.method is None:
            await self._check_name(request, http)
            return await self._forward(request, request.content, http)
        if request.wants_tools:
            return await self._with_tools(request, http)
        return await self._reason(request, http)

    async def _check_name(self, request: ChatRequest, http: Request) -> None:
        """A misspelt method must not be answered as if none had been asked for."""
        if not (meant := looks_like_method(request.model)):
            return
        try:
            names = await self.upstream.models(_key(http))
        except RequestFailed as error:
            if error.status not in NO_LIST:
                raise
            return  # it will say itself whether it knows the name
        if request.model not in names:
            message = f"there is no model {request.model!r}{meant}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _forward(self, request: ChatRequest, content: bytes, http: Request) -> Response:
        plain = await self.upstream.forward(request, content, dict(http.headers))
        return StreamingResponse(plain.content, plain.status, headers=plain.headers)

    async def _with_tools(self, request: ChatRequest, http: Request) -> Response:
        if self.options.tools == "refuse":
            raise ApiError(
                400,
                f"tools: {request.model} cannot call tools; ask {request.upstream_model}, or start the server with "
                "--tools pass",
                param="tools",
            )
        body = {**request.body, "model": request.upstream_model}
        answer = await self._forward(request, encoded(body), http)
        answer.headers["x-luthier"] = "tools were asked for, so the plain model answered"
        return answer

    async def _reason(self, request: ChatRequest, http: Request) -> Response:
        config, messages = settings(request, self.options.limits), conversation(request.body)
        models = Models(self.upstream.backend(request.upstream_model, _key(http)), price=self.options.price)

        def work(*listeners: Listener) -> Awaitable[Solution]:
            trace = Trace(request.name, (*self.options.listeners, *listeners))
            how = {"equivalence": self.grader.equivalent, "trace": trace, "seed": request.seed}
            return self.solve(messages, models, config, **how)

        if request.stream:
            events = answer_events(request, work, alive_every=self.options.alive_every)
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            return StreamingResponse(await begun(events), headers=headers)
        cut: list[str] = []
        solution = await work(lambda happened: cut.extend(cut_short(happened)))
        answer = completion(request, {0: (solution.text, finish_reason(solution, cut))}, solution.usage)
        whole = {**answer, "luthier": extension(request, solution)}
        return Response(encoded(whole), media_type="application/json")


async def _unless_gone(work: Awaitable[Response], http: Request) -> Response | None:
    """The outcome; None, with the work cancelled, when the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(http: Request) -> None:
    """Return when the client has left. Nothing else can come: the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _key(http: Request) -> str | None:
    """The client's key, None without one. Raises: ApiError 401 for other kinds of authorization."""
    kind, _, key = http.headers.get("authorization", "").partition(" ")
    if kind and kind.lower() != "bearer":
        message = f"authorization: got {kind!r}, but calls of a reasoner need 'Bearer KEY'"
        raise ApiError(401, message, kind="authentication_error")
    return key.strip() or http.headers.get("api-key") or None
