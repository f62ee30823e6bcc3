"""Endpoint: a model behind any OpenAI-compatible server (OpenAI, vLLM, SGLang, llama.cpp, Ollama, gateways).

What it promises:

- A failed call is an EndpointError with the server's own words and a next step; it never turns into an empty answer.
- Only failures that can pass are tried again: 408, 409, 425, 429, 5xx, timeouts and broken connections, with growing
  jittered waits or the server's Retry-After. A refused connection before the server ever answered fails at once.
- The server's dialect is learned from its refusals (`dialect.py`); nothing that the caller asked for is left out
  without consent.
- Where the server has no `n`, samples are asked for one by one; the ones that succeeded survive the failure of another
  (`RequestFailed.completions`).
- The API key is in the Authorization header and nowhere else: not in repr, errors, logs or configs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import httpx

from luthier.core.errors import ConfigError, EndpointError, did_you_mean
from luthier.llm import replies, retry
from luthier.llm.dialect import Dialect, Fault
from luthier.llm.pools import pooled
from luthier.llm.types import Completion, Request, RequestFailed, Score, Usage

KEY_VARIABLE = "OPENAI_API_KEY"
HINTS: dict[int, str] = {
    200: "is this the URL of an OpenAI-compatible API? It usually ends in /v1",
    400: "the server does not accept this request: change what its message names",
    401: f"set {KEY_VARIABLE} to a valid key for this server",
    403: f"the key in {KEY_VARIABLE} may not use this model on this server",
    404: "check the URL (it usually ends in /v1) and the model's name",
    429: "the server limits the rate: lower the concurrency, or check the account's quota",
}
MakeBody = Callable[[], dict[str, Any]]


class Endpoint:
    """A `Backend` over HTTP. Create it, use it and close it inside one event loop.

    `url`: the server, e.g. http://localhost:8000 or https://api.openai.com/v1. `api_key`: by default what the
    environment has in OPENAI_API_KEY. `concurrency`: most calls in flight. `timeout`: seconds without a byte from the
    server; `connect_timeout`: seconds to reach it. `max_retries`: extra tries of one call. `ignore_unsupported`:
    sampling parameters that may be left out for servers that refuse them ("temperature" for reasoning models).
    `transport` and `sleep` are for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        max_retries: int = 5,
        ignore_unsupported: Iterable[str] = (),
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        jitter_seed: int | None = None,
    ) -> None:
        self.url = normalize_url(url)
        self.model = model
        self.usage = Usage()
        self.capabilities = Dialect(model, ignore=ignore_unsupported)
        self._key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("the API key has characters that no key has", hint=f"copy it to {KEY_VARIABLE} again")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout, connect=connect_timeout, pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport or pooled(concurrency),
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._max_retries = max_retries
        self._sleep = sleep
        self._rng = random.Random(jitter_seed)
        self._reached = False

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples, in order. EndpointError (RequestFailed) when any of them failed."""
        done: list[Completion] = []
        # vLLM refuses n > 1 with greedy sampling, so greedy samples are asked for one by one.
        if request.n == 1 or (self.capabilities.native_n and request.temperature > 0):
            done = await self._call(request, request.first_sample, request.n)
            if len(done) < request.n:
                self.capabilities.refused.add("n")
        missing = range(request.first_sample + len(done), request.first_sample + request.n)
        return done + await self._call_each(request, missing, done)

    async def _call_each(self, request: Request, samples: Iterable[int], done: list[Completion]) -> list[Completion]:
        """One call per sample, concurrently. A failure is raised once all are over, and carries what succeeded."""
        calls = [self._call(request, index, 1) for index in samples]
        results = await asyncio.gather(*calls, return_exceptions=True)
        completions = [completion for result in results if isinstance(result, list) for completion in result]
        for error in results:
            if isinstance(error, RequestFailed):
                error.completions = (*done, *completions)
            if isinstance(error, BaseException):
                raise error
        return completions

    async def _call(self, request: Request, first: int, n: int) -> list[Completion]:
        """One call for samples first .. first + n - 1; may return fewer where the server has no `n`."""

        def make_body() -> dict[str, Any]:
            return self.capabilities.body(request, first=first, n=n if self.capabilities.native_n else 1)

        payload = await self._post(_path(request), make_body)
        completions = replies.read_completions(
            payload,
            first=first,
            n=n,
            top=request.top_logprobs if request.logprobs else None,
            enforced=self.capabilities.format(request),
        )
        self.usage += sum((completion.usage for completion in completions), Usage())
        return completions

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """The request's single sample in pieces, as the server writes them. Log-probabilities are not streamed."""
        if request.n != 1:
            raise ConfigError(f"only one sample can be streamed, got n={request.n}", hint="ask with n=1")

        def make_body() -> dict[str, Any]:
            return self.capabilities.body(request, first=request.first_sample, n=1, stream=True)

        async with self._slots:
            response = await self._send(_path(request), make_body, stream=True)
            usage, finished = Usage(calls=1, unreported=1), False
            try:
                async for line in _lines(response):
                    if (event := replies.read_event(line)) is None:
                        continue
                    usage, finished = event.usage or usage, finished or event.finished
                    if event.text:
                        yield event.text
            except httpx.RequestError as error:
                raise self._unreachable(error) from error
            finally:
                await response.aclose()
                self.usage += usage
            if not finished:
                raise RequestFailed(f"{self.url} broke off in the middle of an answer", hint="try again")

    async def score(self, prompt: str, completion: str) -> Score:
        """Log-probability of `completion` after `prompt`, tokenized together by the server.

        Needs `/completions` with `echo` and log-probabilities: vLLM, SGLang, recent llama.cpp.
        """
        payload = await self._post("completions", lambda: self.capabilities.score_body(prompt, completion))
        max_tokens = self.capabilities.score_body(prompt, completion)["max_tokens"]
        score = replies.read_score(payload, completion, max_tokens=max_tokens)
        self.usage += score.usage
        return score

    async def models(self) -> list[str]:
        """The names of the models that the server offers."""
        try:
            response = await self._client.get(f"{self.url}/models")
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        if (fault := await _fault_of(response, stream=False)) is not None:
            raise await self._failure(fault, "models", tries=1)
        return [entry["id"] for entry in response.json().get("data") or []]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _post(self, path: str, make_body: MakeBody) -> dict[str, Any]:
        """The server's parsed answer."""
        async with self._slots:
            response = await self._send(path, make_body, stream=False)
        payload: dict[str, Any] = response.json()
        return payload

    async def _send(self, path: str, make_body: MakeBody, *, stream: bool) -> httpx.Response:
        """A successful response: the dialect is adapted and passing failures are tried again on the way."""
        attempt = 0
        while True:
            body = make_body()
            wait: float | None = None
            try:
                request = self._client.build_request("POST", f"{self.url}/{path}", json=body)
                response = await self._client.send(request, stream=stream)
                fault = await _fault_of(response, stream)
            except httpx.RequestError as error:
                failure = self._unreachable(error)
                retryable = self._reached or isinstance(error, httpx.TimeoutException)
            else:
                self._reached = True
                if fault is None:
                    return response
                if self.capabilities.learn(body, fault) and make_body() != body:
                    continue
                failure = await self._failure(fault, path, tries=attempt + 1)
                retryable = retry.is_retryable(fault)
                wait = failure.retry_after = retry.read_retry_after(response.headers.get("retry-after"))
            if not retryable or attempt >= self._max_retries or (wait or 0) > 10 * retry.LONGEST_WAIT:
                raise failure
            await self._sleep(retry.backoff(attempt, self._rng) if wait is None else wait)
            attempt += 1

    async def _failure(self, fault: Fault, path: str, *, tries: int) -> RequestFailed:
        """The error that the user sees for a server's refusal."""
        said = fault.message.replace(self._key, "***") if self._key else fault.message
        hint = HINTS.get(fault.status, "look at the server's log, then run the same command again")
        if fault.status == 404 and path != "models":
            hint = await self._hint_for_404()
        if fault.code == "insufficient_quota":
            hint = "the account has no credit left"
        after = f" (after {tries} tries)" if tries > 1 else ""
        return RequestFailed(
            f"{self.url}/{path} answered {fault.status}: {said}{after}", hint=hint, status=fault.status
        )

    async def _hint_for_404(self) -> str:
        try:
            names = await self.models()
        except (EndpointError, KeyError, TypeError):
            return HINTS[404]
        if self.model in names:
            return f"{HINTS[404]}; the server does list {self.model!r}"
        return f"the server has no {self.model!r}{did_you_mean(self.model, names)}; it has: {', '.join(names[:20])}"

    def _unreachable(self, error: httpx.RequestError) -> RequestFailed:
        reason = str(error) or type(error).__name__
        kind = f"cannot be reached ({reason})"
        if isinstance(error, httpx.TimeoutException):
            kind = "timed out"
        elif isinstance(error, httpx.DecodingError):
            kind = f"sent what cannot be read ({reason})"
        hint = f"is the server running at {self.url}?"
        if isinstance(error, httpx.ReadTimeout):
            hint = "the server is too slow for this timeout: raise it, lower the concurrency, or ask for fewer tokens"
        return RequestFailed(f"{self.url} {kind}", hint=hint, timed_out=isinstance(error, httpx.TimeoutException))


def normalize_url(url: str) -> str:
    """The base URL of the API: with scheme, without a trailing slash, `/v1` added to a bare host."""
    try:
        valid = httpx.URL(url).scheme in ("http", "https") and httpx.URL(url).host != ""
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise ConfigError(f"endpoint is {url!r}, expected a URL", hint="for example http://localhost:8000/v1")
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/chat")
    return base if "/" in base.split("://", 1)[1] else f"{base}/v1"


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of an event stream. Not httpx's own, which also end at U+2028 and others that JSON text may hold."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _path(request: Request) -> str:
    return "chat/completions" if request.prompt is None else "completions"


async def _fault_of(response: httpx.Response, stream: bool) -> Fault | None:
    """What is wrong with a response; None when it can be used."""
    if response.status_code >= 400:
        await response.aread()
        return replies.read_fault(response.status_code, response.text)
    if stream and "json" not in response.headers.get("content-type", ""):
        return None
    await response.aread()
    try:
        payload = json.loads(response.text)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        # What begins like an answer was cut off on the way, and may come whole next time.
        code = retry.CUT_OFF if response.text.lstrip().startswith("{") else None
        return Fault(status=response.status_code, code=code, message=f"not a JSON object but {response.text[:60]!r}")
    return replies.fault_in(response.status_code, payload)
