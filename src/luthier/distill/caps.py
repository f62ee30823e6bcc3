"""Caps on what a teacher may cost, held before a request is sent and not after. Loads no torch.

Nobody knows beforehand how long a reply will be, so every request first reserves the most that it can cost: as many
prompt tokens as its text has bytes, and `max_tokens` for each sample. What was not needed is given back with the reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from luthier.core.errors import ConfigError
from luthier.llm.types import Message, Usage

REQUEST_TOKENS = 100  # what a chat template may add to a request: marks, a date, a system message of its own
MESSAGE_TOKENS = 16  # and to each message

Price = Callable[[Usage], float | None]
"""Dollars of some tokens; None when unknown."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Limits of a whole collection, earlier runs of it included; None: no limit."""

    calls: int | None = None
    """Requests, those that failed included."""
    tokens: int | None = None
    """Prompt and generated tokens together."""
    dollars: float | None = None
    """Needs a price."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ConfigError(f"the cap on {name} is {value}, expected more than 0", hint="leave it out: no limit")


def most(asked: str | Sequence[Message], samples: int, max_tokens: int) -> Usage:
    """The most that a request can cost, in calls and tokens.

    No tokenizer with bytes as its smallest tokens makes more tokens than bytes. A server without `n` gets a call for
    each sample, and reads the prompt each time.
    """
    if isinstance(asked, str):
        prompt = len(asked.encode())
    else:
        prompt = sum(len(message["content"].encode()) + MESSAGE_TOKENS for message in asked)
    tokens = samples * (prompt + REQUEST_TOKENS)
    return Usage(prompt_tokens=tokens, completion_tokens=samples * max_tokens, calls=samples)


class Ledger:
    """What was spent and what is reserved, against the caps.

    `spent`: by earlier runs. Raises: ConfigError for a cap on dollars without a price.
    """

    def __init__(self, caps: Caps, price: Price | None = None, spent: Usage | None = None) -> None:
        self.caps, self.price, self.spent = caps, price, spent or Usage()
        self._reserved: list[Usage] = []
        self._changed = asyncio.Condition()
        if caps.dollars is not None and (price is None or price(Usage(prompt_tokens=1)) is None):
            raise ConfigError(
                "a cap on dollars needs the price of this model", hint="add it to the table of prices, or cap tokens"
            )

    async def reserve(self, worst: Usage) -> str | None:
        """Reserve the most that a request can cost. The name of a cap when it cannot be sent within that one.

        Waits for requests under way, since what they do not need may be enough.
        """
        async with self._changed:
            while (name := self._passed(worst)) is not None:
                if not self._reserved:
                    return name
                await self._changed.wait()
            self._reserved.append(worst)
            return None

    async def settle(self, worst: Usage, actual: Usage) -> None:
        """Give a reservation back and book what was spent; where the server told no tokens, all that was reserved."""
        async with self._changed:
            self._reserved.remove(worst)
            self.spent += _told(actual, worst)
            self._changed.notify_all()

    def _passed(self, worst: Usage) -> str | None:
        total = sum(self._reserved, self.spent + worst)
        amounts: Mapping[str, float | None] = {
            "calls": total.calls,
            "tokens": total.prompt_tokens + total.completion_tokens,
            "dollars": self.price(total) if self.price else None,
        }
        for name, limit in vars(self.caps).items():
            amount = amounts[name]
            if limit is not None and (amount is None or amount > limit):
                return name
        return None


def _told(actual: Usage, worst: Usage) -> Usage:
    if not actual.unreported:
        return actual
    tokens = {"prompt_tokens": worst.prompt_tokens, "completion_tokens": worst.completion_tokens}
    return Usage(**tokens, calls=actual.calls)
