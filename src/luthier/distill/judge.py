"""Two replies to a prompt, compared by a third model behind any endpoint. Loads no torch.

A judge has habits: it prefers what it sees first, and what is longer. So every pair is shown in both orders, and only
what survives the swap counts: a judge who always names the first reply gives every pair half a point to each side. And
beside the win rate stands the one that is left at equal lengths (`length_controlled`, after Dubois et al., 2404.04475,
with one slope for all prompts), and that of pairs whose replies are about equally long (`by_length`): a win rate that
lives on length is no quality.

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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.core.errors import EndpointError
from luthier.core.stats import Interval, bootstrap_ratio
from luthier.distill import prompts
from luthier.llm.types import Backend, Message, Request

_VERDICT = re.compile(r"verdict\W*\s*(1|2|tie)\b", re.IGNORECASE)
_SCORES = re.compile(r"\W*(?:scores)?\W*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\W*", re.IGNORECASE)
LENGTH_EDGES = (0.5, 0.8, 1.25, 2.0)
"""Edges of bins of the ratio of two lengths; the middle bin holds pairs of about equal length."""
Ask = Callable[[str | Sequence[Message], str, str], list[Message]]
Advance = Callable[[int], None]
Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
SLOPE = 3.0  # standard deviation of what is believed of the slope by length before
SURE = 12.0  # largest logit of a win rate: 1 - 6e-6


def _unseen(pairs: int) -> None:
    """Nobody watches."""


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
    """Mean points of the first replies, bootstrap over prompts, whose number is `n`: 0.5 is no difference."""
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


async def compare(
    backend: Backend, pairs: Sequence[Pair], settings: JudgeSettings | None = None, *, advance: Advance = _unseen
) -> Verdict:
    """Which replies are better; `advance` is told of every pair. What is under way when a call fails is waited for.

    Raises: EndpointError when a call fails, or when no verdict at all can be read.
    """
    return summarize(await _judge(backend, pairs, prompts.compare, read_verdict, settings or JudgeSettings(), advance))


async def rate(backend: Backend, pairs: Sequence[Pair], settings: JudgeSettings | None = None) -> Verdict:
    """Scores of the first replies against the second ones, the references: points are s / (s + r). Raises as above.

    100 times `Verdict.rate` is the figure of the paper's tables.
    """
    return summarize(await _judge(backend, pairs, prompts.rate, read_scores, settings or JudgeSettings(), _unseen))


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
    ask: Ask,
    read: Callable[[str], float | None],
    settings: JudgeSettings,
    advance: Advance,
) -> list[Judgement]:
    slots = asyncio.Semaphore(settings.at_once)
    failed = list[EndpointError]()

    async def points(messages: list[Message]) -> float | None:
        """Of the reply shown first; nothing more is asked once a call has failed."""
        async with slots:
            for attempt in range(0 if failed else settings.tries):
                try:
                    (reply,) = await backend.complete(_request(messages, attempt, settings))
                except EndpointError as error:
                    failed.append(error)
                    return None
                if reply.finish_reason == "stop" and (found := read(reply.text)) is not None:
                    return found
        return None

    async def both(pair: Pair) -> Judgement:
        straight, swapped = await asyncio.gather(*map(points, orders(pair, ask)))
        advance(1)
        return Judgement(pair, (straight, None if swapped is None else 1 - swapped))

    judgements = list(await asyncio.gather(*map(both, pairs)))
    if failed:
        raise failed[0]
    return judgements


def orders(pair: Pair, ask: Ask = prompts.compare) -> tuple[list[Message], list[Message]]:
    """What a judge is told of a pair: with the first reply shown first, and shown second."""
    return ask(pair.prompt, pair.first, pair.second), ask(pair.prompt, pair.second, pair.first)


def first_requests(pairs: Sequence[Pair], settings: JudgeSettings) -> list[Request]:
    """What `compare` asks if every verdict can be read at once; the same request comes once."""
    made = [_request(messages, 0, settings) for pair in pairs for messages in orders(pair)]
    return list({str(request.canonical()): request for request in made}.values())


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
    of_prompts = [judgement.pair.prompt for judgement in judgements if judgement.points is not None]
    firsts = [(straight + 1 - swapped) / 2 for _, (straight, swapped) in known]  # type: ignore[operator]
    return Verdict(
        rate=mean_points(values, of_prompts),
        wins=sum(value > 0.5 for value in values),
        ties=sum(value == 0.5 for value in values),
        losses=sum(value < 0.5 for value in values),
        unread=len(judgements) - len(known),
        consistent=sum(_side(a) == _side(b) for _, (a, b) in known) / len(known),
        first_shown=sum(firsts) / len(firsts),
        judgements=tuple(judgements),
    )


def mean_points(points: Sequence[float], of_prompts: Sequence[str | Sequence[Message]]) -> Interval:
    """Mean over pairs, with a bootstrap over prompts: pairs of one prompt are drawn together."""
    which = _numbered(of_prompts)
    return bootstrap_ratio(np.bincount(which, points).tolist(), np.bincount(which).astype(float).tolist())


def _numbered(of_prompts: Sequence[str | Sequence[Message]]) -> list[int]:
    """Equal prompts have equal numbers, from 0 on as they come."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(str(prompt), len(numbers)) for prompt in of_prompts]


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
        inside = [(j.points, j.pair.prompt) for j in judgements if low <= _ratio(j.pair, length) < high]
        known = [(value, prompt) for value, prompt in inside if value is not None]
        if known:
            bins.append(LengthBin(low, high, mean_points(*map(list, zip(*known, strict=True)))))
    return bins


def matched(
    judgements: Sequence[Judgement], length: Callable[[str], int] = len, edges: Sequence[float] = LENGTH_EDGES
) -> Interval | None:
    """Mean points of pairs of about equal length, the bin that holds ratio 1; None where there is none."""
    return next((found.rate for found in by_length(judgements, length, edges) if found.low <= 1 < found.high), None)


def _ratio(pair: Pair, length: Callable[[str], int]) -> float:
    return max(length(pair.first), 1) / max(length(pair.second), 1)


def length_controlled(
    judgements: Sequence[Judgement], length: Callable[[str], int] = len, seed: int = 0
) -> Interval | None:
    """The mean points that are left when both replies are equally long; a bootstrap over prompts.

        points ~ sigmoid(a + b · tanh(x / s)),   x = ln(length of the first / length of the second), s its RMS,

    by maximum likelihood with a normal prior on b, of deviation 3; the result is sigmoid(a). Where all lengths are
    equal it is the plain mean. None where all first replies are longer, or all are shorter: then it would be a guess.
    """
    known = [(j.points, math.log(_ratio(j.pair, length)), j.pair.prompt) for j in judgements if j.points is not None]
    if not known:
        return None
    points, ratios = (np.array([row[column] for row in known], float) for column in (0, 1))
    if ratios.min() > 0 or ratios.max() < 0:
        return None
    spread = float(np.sqrt(np.mean(ratios**2)))
    feature = np.tanh(ratios / spread) if spread else ratios
    which = np.array(_numbered([prompt for *_, prompt in known]))
    prompts_seen, rng = int(which.max()) + 1, np.random.Generator(np.random.PCG64(seed))
    drawn = rng.multinomial(prompts_seen, [1 / prompts_seen] * prompts_seen, size=RESAMPLES)
    resampled = [at_equal_length(points, feature, counts[which].astype(float)) for counts in drawn]
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = at_equal_length(points, feature, np.ones(len(points)))
    return Interval(value, float(low), float(high), prompts_seen)


def at_equal_length(points: Floats, feature: Floats, weights: Floats) -> float:
    """sigmoid(a) of the fit above: points, feature and how often each pair counts, all (N,). Newton's method."""
    a = b = 0.0
    for _ in range(50):
        p = 0.5 * (1 + np.tanh(0.5 * (a + b * feature)))
        error, curve = weights * (points - p), weights * p * (1 - p)
        gradient = np.array([error.sum(), error @ feature - b / SLOPE**2])
        mixed = float(curve @ feature)
        hessian = np.array([[curve.sum() + 1e-9, mixed], [mixed, float(curve @ feature**2) + 1 / SLOPE**2]])
        step = np.clip(np.linalg.solve(hessian, gradient), -2, 2)  # far from the optimum a whole step may overshoot
        a, b = float(np.clip(a + step[0], -SURE, SURE)), b + float(step[1])
        if np.abs(step).max() < 1e-9:
            break
    return 0.5 * (1 + math.tanh(0.5 * a))
