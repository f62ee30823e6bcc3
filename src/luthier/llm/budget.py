"""BudgetedBackend: a limit on what a model may cost, which is never passed.

Every call first sets aside the most that it can cost; a call that does not fit waits for those under way, whose real
cost is mostly less, and is refused with BudgetSpent when nothing is under way any more. Inside a `CachedBackend` stored
replies cost nothing; started with what the store has paid for, the limit holds over all runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from luthier.core.errors import ConfigError, EndpointError
from luthier.llm.types import Backend, Completion, Request, RequestFailed, Score, Usage

Price = Callable[[str, Usage], float | None]
MESSAGE_TOKENS = 16
"""What a chat template adds to a message, at most."""


class BudgetSpent(EndpointError):
    """The next call might go over a limit."""


class BudgetedBackend:
    """A `Backend` that stops at a limit: calls, generated tokens, or dollars. None: no limit.

    `price(model, usage)` gives dollars. `spent`: what was paid before. A server that tells no token counts is charged
    the most that the call could have cost. Only completions are limited, not scores.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price: Price | None = None,
        spent: Usage | None = None,
    ) -> None:
        if max_cost is not None and (price is None or price(inner.model, Usage()) is None):
            raise ConfigError(
                f"the price of {inner.model!r} is unknown, so a limit in dollars cannot be kept",
                hint="add the model to the table of prices, or limit tokens instead",
            )
        self.inner = inner
        self.spent = spent or Usage()
        self._limits = {"calls": max_calls, "tokens": max_tokens, "dollars": max_cost}
        self._price = price
        self._under_way: list[Usage] = []
        self._changed = asyncio.Condition()

    @property
    def model(self) -> str:
        return self.inner.model

    @property
    def usage(self) -> Usage:
        return self.inner.usage

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples. Raises: BudgetSpent, EndpointError."""
        most = self._most(request)
        async with self._changed:
            while (limit := self._broken(most)) is not None:
                if not self._under_way:
                    raise BudgetSpent(
                        f"the budget of {self._limits[limit]:,} {limit} is spent", hint="run again with a larger budget"
                    )
                await self._changed.wait()
            self._under_way.append(most)
        paid: Sequence[Completion] = ()
        try:
            paid = completions = await self.inner.complete(request)
        except RequestFailed as failure:
            paid = failure.completions
            raise
        finally:
            self._under_way.remove(most)
            self.spent += _charge(paid, most)
            async with self._changed:
                self._changed.notify_all()
        return completions

    async def score(self, prompt: str, completion: str) -> Score:
        """The inner backend's score."""
        return await self.inner.score(prompt, completion)

    async def aclose(self) -> None:
        """Close the inner backend."""
        await self.inner.aclose()

    def _most(self, request: Request) -> Usage:
        if request.max_tokens is None and (self._limits["tokens"], self._limits["dollars"]) != (None, None):
            raise ConfigError("a budget needs requests with a limit of tokens", hint="set max_tokens")
        return most_of(request)

    def _broken(self, most: Usage) -> str | None:
        """The limit that a call could break, with all that is under way."""
        total = sum(self._under_way, self.spent) + most
        costs = {"calls": total.calls, "tokens": total.completion_tokens, "dollars": self._dollars(total)}
        return next((name for name, limit in self._limits.items() if limit is not None and costs[name] > limit), None)

    def _dollars(self, usage: Usage) -> float:
        return 0.0 if self._price is None else self._price(self.model, usage) or 0.0


def most_of(request: Request) -> Usage:
    """The most that a request with `max_tokens` can cost. A token is at least one byte of the prompt."""
    texts = [request.prompt or "", *(message["content"] for message in request.messages)]
    prompt = sum(len(text.encode("utf-8", "surrogatepass")) + MESSAGE_TOKENS for text in texts)
    return Usage(
        prompt_tokens=prompt * request.n,
        completion_tokens=(request.max_tokens or 0) * request.n,
        calls=request.n,
    )


def _charge(completions: Sequence[Completion], most: Usage) -> Usage:
    used = sum((completion.usage for completion in completions), Usage())
    if not used.unreported:
        return used
    return Usage(prompt_tokens=most.prompt_tokens, completion_tokens=most.completion_tokens, calls=used.calls)
