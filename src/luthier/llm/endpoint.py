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
import functools
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from luthier.core.errors import ConfigError, EndpointError, did_you_mean
from luthier.llm import replies, retry
from luthier.llm.connections import FAILURES, open_session, reason
from luthier.llm.dialect import Dialect, Fault
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
    `session`: connections that several endpoints share, and that whoever made them closes; then the timeouts are
    its own. `sleep` is for tests.
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
        session: aiohttp.ClientSession | None = None,
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
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._shared = session
        self._own: aiohttp.ClientSession | None = None
        self._open_session = functools.partial(
            open_session, self.url, timeout=timeout, connect_timeout=connect_timeout, connections=concurrency
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

        return self._completions(request, await self._post(_path(request), make_body), first=first, n=n)

    def _completions(self, request: Request, payload: dict[str, Any], *, first: int, n: int) -> list[Completion]:
        """The samples in an answer, counted."""
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
        """The request's single sample in pieces, as the server writes them: in one where it does not stream.

        Log-probabilities are not streamed.
        """
        if request.n != 1:
            raise ConfigError(f"only one sample can be streamed, got n={request.n}", hint="ask with n=1")

        def make_body() -> dict[str, Any]:
            return self.capabilities.body(request, first=request.first_sample, n=1, stream=True)

        async with self._slots:
            answer = await self._send(_path(request), make_body, stream=True)
            if (response := answer.stream) is None:
                yield self._completions(request, answer.payload, first=request.first_sample, n=1)[0].text
                return
            usage, finished = Usage(calls=1, unreported=1), False
            try:
                async for line in _lines(response.content):
                    if (event := replies.read_event(line)) is None:
                        continue
                    usage, finished = event.usage or usage, finished or event.finished
                    if event.text:
                        yield event.text
            except FAILURES as error:
                raise self._unreachable(error) from error
            finally:
                response.close()
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
            asked = self._session.get(f"{self.url}/models", headers=self._headers, allow_redirects=False)
            answer = await _read(await asked, stream=False)
        except FAILURES as error:
            raise self._unreachable(error) from error
        if answer.fault is not None:
            raise await self._failure(answer.fault, "models", tries=1)
        return [entry["id"] for entry in answer.payload.get("data") or []]

    async def aclose(self) -> None:
        """Close the connections."""
        if self._own is not None:
            await self._own.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Made at the first call: a session belongs to the event loop that runs then."""
        if self._shared is not None:
            return self._shared
        if self._own is None:
            self._own = self._open_session()
        return self._own

    async def _post(self, path: str, make_body: MakeBody) -> dict[str, Any]:
        """The server's parsed answer."""
        async with self._slots:
            return (await self._send(path, make_body, stream=False)).payload

    async def _send(self, path: str, make_body: MakeBody, *, stream: bool) -> Answer:
        """A successful answer: the dialect is adapted and passing failures are tried again on the way."""
        attempt = 0
        while True:
            body = make_body()
            wait: float | None = None
            try:
                content = json.dumps(body).encode()
                asked = self._session.post(
                    f"{self.url}/{path}", data=content, headers=self._headers, allow_redirects=False
                )
                answer = await _read(await asked, stream)
            except FAILURES as error:
                failure = self._unreachable(error)
                retryable = self._reached or isinstance(error, TimeoutError)
            else:
                self._reached = True
                if answer.fault is None:
                    return answer
                if self.capabilities.learn(body, answer.fault) and make_body() != body:
                    continue
                failure = await self._failure(answer.fault, path, tries=attempt + 1)
                retryable = retry.is_retryable(answer.fault)
                wait = failure.retry_after = retry.read_retry_after(answer.retry_after)
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

    def _unreachable(self, error: Exception) -> RequestFailed:
        late = isinstance(error, TimeoutError)
        kind = "timed out" if late else f"cannot be reached ({reason(error)})"
        if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientResponseError)):
            kind = f"sent what cannot be read ({reason(error)})"
        hint = f"is the server running at {self.url}?"
        if isinstance(error, aiohttp.ClientSSLError):
            hint = "does it speak https? For an authority of your own, name its file in SSL_CERT_FILE"
        if late and not isinstance(error, aiohttp.ConnectionTimeoutError):
            hint = "the server is too slow for this timeout: raise it, lower the concurrency, or ask for fewer tokens"
        return RequestFailed(f"{self.url} {kind}", hint=hint, timed_out=late)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered: `payload` is empty where there is a `fault` or an open `stream`."""

    payload: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    retry_after: str | None = None
    stream: aiohttp.ClientResponse | None = None


async def _read(response: aiohttp.ClientResponse, stream: bool) -> Answer:
    """The whole answer, or with `stream` an event stream that is left open."""
    status = response.status
    if stream and status < 400 and "json" not in response.headers.get("Content-Type", ""):
        return Answer(stream=response)
    async with response:
        content = await response.read()
    retry_after = response.headers.get("Retry-After")
    if status >= 400:
        return Answer(fault=replies.read_fault(status, content.decode("utf-8", "replace")), retry_after=retry_after)
    try:
        payload = json.loads(content)
    except ValueError:
        payload = None
    if isinstance(payload, dict):
        fault = replies.fault_in(status, payload)
        return Answer(payload=payload if fault is None else {}, fault=fault, retry_after=retry_after)
    # What begins like an answer was cut off on the way, and may come whole next time.
    code = retry.CUT_OFF if content.lstrip().startswith(b"{") else None
    said = f"not a JSON object but {content[:60].decode('utf-8', 'replace')!r}"
    return Answer(fault=Fault(status=status, code=code, message=said))


def normalize_url(url: str) -> str:
    """The base URL of the API: with scheme, without a trailing slash, `/v1` added to a bare host."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"endpoint is {url!r}, expected a URL", hint="for example http://localhost:8000/v1")
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/chat")
    return base if "/" in base.split("://", 1)[1] else f"{base}/v1"


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """The lines of an event stream, which end at newlines and not at U+2028 and others that JSON text may hold."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _path(request: Request) -> str:
    return "chat/completions" if request.prompt is None else "completions"
