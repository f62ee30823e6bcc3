"""ScriptedBackend: a model that says what it is told to. For tests, examples and dry runs; no network, no weights."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from luthier.core.errors import EndpointError
from luthier.llm.types import Completion, Request, Score, TokenLogprob, Usage

Reply = str | Completion | Exception


class ScriptedBackend:
    """Answers from a list, in order, or from a function of (request, sample index).

    A reply that is an exception is raised. Whatever was asked is in `requests` and `scored`. Usage counts words.

    `delay`: seconds before each call answers; `scores(prompt, completion)`: the log-probability (nats) that `score`
    reports for the whole completion. A list that runs out is an EndpointError, never an empty answer.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Callable[[Request, int], Reply],
        *,
        model: str = "scripted",
        delay: float = 0.0,
        scores: Callable[[str, str], float] | None = None,
    ) -> None:
        self._reply = replies if callable(replies) else _in_order(replies)
        self._scores = scores
        self._delay = delay
        self.model = model
        self.usage = Usage()
        self.requests: list[Request] = []
        self.scored: list[tuple[str, str]] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.closed = False

    async def complete(self, request: Request) -> list[Completion]:
        """The scripted replies to the request's n samples."""
        self.requests.append(request)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self._delay)
            samples = range(request.first_sample, request.first_sample + request.n)
            completions = [self._completion(request, index) for index in samples]
        finally:
            self.in_flight -= 1
        for completion in completions:
            self.usage += completion.usage
        return completions

    def _completion(self, request: Request, index: int) -> Completion:
        reply = self._reply(request, index)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Completion):
            return replace(reply, index=index)
        first = index == request.first_sample
        usage = Usage(
            prompt_tokens=_count_words(request) if first else 0,
            completion_tokens=len(reply.split()),
            calls=int(first),
        )
        return Completion(text=reply, finish_reason="stop", index=index, usage=usage)

    async def stream(
        self, request: Request, finished: Callable[[Completion], None] | None = None
    ) -> AsyncIterator[str]:
        """The reply, word by word; `finished` gets the whole completion after the last."""
        (completion,) = await self.complete(request)
        for word in re.findall(r"\s*\S+|\s+", completion.text):
            await asyncio.sleep(self._delay)
            yield word
        if finished is not None:
            finished(completion)

    async def score(self, prompt: str, completion: str) -> Score:
        """The scripted log-probability, as one token."""
        if self._scores is None:
            raise EndpointError("this ScriptedBackend has no scores", hint="pass scores=lambda prompt, completion: ...")
        self.scored.append((prompt, completion))
        usage = Usage(prompt_tokens=len(prompt.split()) + len(completion.split()), calls=1)
        self.usage += usage
        return Score(tokens=(TokenLogprob(token=completion, logprob=self._scores(prompt, completion)),), usage=usage)

    async def aclose(self) -> None:
        self.closed = True


def _in_order(replies: Sequence[Reply]) -> Callable[[Request, int], Reply]:
    remaining = iter(replies)

    def reply(request: Request, index: int) -> Reply:
        try:
            return next(remaining)
        except StopIteration:
            raise EndpointError(
                f"the script is over: all {len(replies)} replies were used", hint="give ScriptedBackend more replies"
            ) from None

    return reply


def _count_words(request: Request) -> int:
    texts = [request.prompt or "", *(message["content"] for message in request.messages)]
    return sum(len(text.split()) for text in texts)
