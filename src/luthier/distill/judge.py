"""Two replies to a prompt, compared by a third model behind any endpoint. Loads no torch.

A judge has habits: it prefers what it sees first, and what is longer. So every pair is shown in both orders, and only
what survives the swap counts: a judge who always names the first reply gives every pair half a point to each side. And
beside the win rate stands the one of pairs whose replies are about equally long (`by_length`): a win rate that lives on
length is no quality.

Two protocols. `compare`: which reply is better, or is it a tie. `rate`: the paper's (§A.3), where a reference answer is
scored beside the reply, and the result is 100 · score / (score + score of the reference); 50 is as good as the
reference. The paper does not say whether it swaps positions or whether it averages ratios; here positions are swapped,
and ratios averaged over prompts.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from luthier.core.errors import EndpointError
from luthier.core.stats import Interval, bootstrap_mean
from luthier.distill import prompts
from luthier.llm.types import Backend, Message, Request

_VERDICT = re.compile(r"verdict\W*\s*(1|2|tie)\b", re.IGNORECASE)
_SCORES = re.compile(r"\W*(?:scores)?\W*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\W*", re.IGNORECASE)
LENGTH_EDGES = (0.5, 0.8, 1.25, 2.0)
"""Edges of bins of the ratio of two lengths; the middle bin holds pairs of about equal length."""
Point = TypeVar("Point")


class Pair(NamedTuple):
    """Two replies to one prompt; the first is the one whose share of wins is measured."""

    prompt: str | Sequence[Message]
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How the judge is asked."""

    tries: int = 3
    """Times that a verdict is asked for before it counts as unread."""
    temperature: float = 0.0
    """Of the first try; later ones are sampled at 0.7 at least, since the same reply would come again."""
    max_tokens: int = 1024
    """Longest verdict in tokens."""
    at_once: int = 16
    """Requests in flight."""
    seed: int | None = None
    """Sent with every request."""


@dataclass(frozen=True)
class Judgement:
    """One pair, seen in both orders. `points` of the first reply in [0, 1], `orders`: with it shown first, second.

    None where no verdict could be read. For `rate` the points are its share of the two scores.
    """

    pair: Pair
    orders: tuple[float | None, float | None]

    @property
    def points(self) -> float | None:
        """The mean of both orders; None where one of them was unread, for a habit would no longer cancel."""
        shown_first, shown_second = self.orders
        return None if shown_first is None or shown_second is None else (shown_first + shown_second) / 2


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of many pairs."""

    rate: Interval
    """Mean points of the first replies, bootstrap over prompts: 0.5 is no difference."""
    wins: int
    """Pairs that the first reply won, over both orders."""
    ties: int
    """Even pairs, those that were decided once for each included."""
    losses: int
    unread: int
    """Pairs without a verdict that could be read; they count for nothing else."""
    consistent: float
    """Share of pairs with the same outcome in both orders."""
    first_shown: float
    """Points of whatever reply is shown first: 0.5 without a habit."""
    judgements: Sequence[Judgement] = field(repr=False, default=())


async def compare(backend: Backend, pairs: Sequence[Pair], settings: JudgeSettings | None = None) -> Verdict:
    """Which replies are better. Raises: EndpointError when a call fails, or when no verdict at all can be read."""
    return summarize(await _judge(backend, pairs, prompts.compare, read_verdict, settings or JudgeSettings()))


async def rate(backend: Backend, pairs: Sequence[Pair], settings: JudgeSettings | None = None) -> Verdict:
    """Scores of the first replies against the second ones, the references: points are s / (s + r). Raises as above.

    100 times `Verdict.rate` is the figure of the paper's tables.
    """
    return summarize(await _judge(backend, pairs, prompts.rate, read_scores, settings or JudgeSettings()))


async def references(
    backend: Backend, asked: Sequence[str | Sequence[Message]], *, max_tokens: int = 1536, at_once: int = 16
) -> list[str]:
    """The judge's own answers, greedily, to be scored beside the replies. Raises: EndpointError, for cut ones too."""
    slots = asyncio.Semaphore(at_once)

    async def answer(prompt: str | Sequence[Message]) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        async with slots:
            (reply,) = await backend.complete(Request(messages=messages, temperature=0, max_tokens=max_tokens))
        if reply.finish_reason != "stop" or not reply.text.strip():
            raise EndpointError(
                f"a reference answer ended with {reply.finish_reason} after {len(reply.text)} characters",
                hint="raise max_tokens, or leave this prompt out",
            )
        return reply.text

    return list(await asyncio.gather(*map(answer, asked)))


def read_verdict(text: str) -> float | None:
    """Points of the reply that was shown first: 1, 0, or 0.5 for a tie, from the last verdict of a text; None: none."""
    found = _VERDICT.findall(text)
    return {"1": 1.0, "2": 0.0, "tie": 0.5}[found[-1].lower()] if found else None


def read_scores(text: str) -> float | None:
    """The share of the first shown reply in two scores from 1 to 10, the first line with two numbers; None: none."""
    for match in filter(None, map(_SCORES.fullmatch, text.splitlines())):
        first, second = float(match[1]), float(match[2])
        if 1 <= first <= 10 and 1 <= second <= 10:
            return first / (first + second)
    return None


async def _judge(
    backend: Backend,
    pairs: Sequence[Pair],
    ask: Callable[[str | Sequence[Message], str, str], list[Message]],
    read: Callable[[str], float | None],
    settings: JudgeSettings,
) -> list[Judgement]:
    slots = asyncio.Semaphore(settings.at_once)

    async def points(messages: list[Message]) -> float | None:
        """Of the reply shown first."""
        async with slots:
            for attempt in range(settings.tries):
                (reply,) = await backend.complete(_request(messages, attempt, settings))
                if reply.finish_reason == "stop" and (found := read(reply.text)) is not None:
                    return found
        return None

    async def both(pair: Pair) -> Judgement:
        straight, swapped = await asyncio.gather(
            points(ask(pair.prompt, pair.first, pair.second)), points(ask(pair.prompt, pair.second, pair.first))
        )
        return Judgement(pair, (straight, None if swapped is None else 1 - swapped))

    return list(await asyncio.gather(*map(both, pairs)))


def _request(messages: list[Message], attempt: int, settings: JudgeSettings) -> Request:
    temperature = settings.temperature if attempt == 0 else max(settings.temperature, 0.7)
    return Request(
        messages=messages,
        first_sample=attempt,
        temperature=temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )


def summarize(judgements: Sequence[Judgement]) -> Verdict:
    """The figures of many judgements. Raises: EndpointError when none could be read."""
    points = [(judgement.points, judgement.orders) for judgement in judgements]
    known = [(value, orders) for value, orders in points if value is not None]
    if not known:
        raise EndpointError(
            f"no verdict on any of {len(judgements)} pairs could be read in both orders",
            hint="the judge does not keep to the form that is asked of it: take a stronger model, or raise max_tokens",
        )
    values = [value for value, _ in known]
    firsts = [(straight + 1 - swapped) / 2 for _, (straight, swapped) in known]  # type: ignore[operator]
    return Verdict(
        rate=bootstrap_mean(values),
        wins=sum(value > 0.5 for value in values),
        ties=sum(value == 0.5 for value in values),
        losses=sum(value < 0.5 for value in values),
        unread=len(judgements) - len(known),
        consistent=sum(_side(a) == _side(b) for _, (a, b) in known) / len(known),
        first_shown=sum(firsts) / len(firsts),
        judgements=tuple(judgements),
    )


def _side(points: float | None) -> int:
    return 0 if points is None else (points > 0.5) - (points < 0.5)


class LengthBin(NamedTuple):
    """Pairs whose lengths have a ratio (first over second) in [low, high)."""

    low: float
    high: float
    rate: Interval


def by_length(
    judgements: Sequence[Judgement],
    length: Callable[[str], int] = len,
    edges: Sequence[float] = LENGTH_EDGES,
) -> list[LengthBin]:
    """Mean points by how long the first reply is beside the second; bins without a readable pair are left out.

    length: of a reply, in characters by default.
    """
    bounds = [0.0, *edges, math.inf]
    bins: list[LengthBin] = []
    for low, high in itertools.pairwise(bounds):
        points = [j.points for j in judgements if low <= _ratio(j.pair, length) < high]
        known = [value for value in points if value is not None]
        if known:
            bins.append(LengthBin(low, high, bootstrap_mean(known)))
    return bins


def matched(
    judgements: Sequence[Judgement], length: Callable[[str], int] = len, edges: Sequence[float] = LENGTH_EDGES
) -> Interval | None:
    """Mean points of pairs of about equal length, the bin that holds ratio 1; None where there is none."""
    return next((found.rate for found in by_length(judgements, length, edges) if found.low <= 1 < found.high), None)


def _ratio(pair: Pair, length: Callable[[str], int]) -> float:
    return max(length(pair.first), 1) / max(length(pair.second), 1)
