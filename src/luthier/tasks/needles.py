"""Looking facts up in long documents: how often, and how surely, by length of the document and depth of the fact.

Instella's tests at tiny scale (arXiv 2511.10628; spec: sections 9.2 to 9.4). A problem's metadata say its length and
depth, and the `lead` that comes before the answer in a reply. Correct: the answer is in the greedy reply, as a word of
its own or after its lead. Loss: nats per token of the right answer, after the lead. A document that is longer than the
model's context is not found, and has no loss.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.core.errors import DataError
from luthier.core.stats import Interval, wilson
from luthier.llm.types import Backend, ContextExceeded, Request
from luthier.tasks.task import Problem

ROOM = 4  # tokens of a reply for each character of the right answer, and for as many words before it


@dataclass(frozen=True)
class Reader:
    """How a model in this process reads a prompt."""

    render: Callable[[str], str]
    """Prompt -> the text up to the model's reply."""
    room: Callable[[str], int | None]
    """Such a text -> tokens that its context has left; None: no limit."""


@dataclass(frozen=True)
class Needle:
    """One answer: whether it was right, and the nats and tokens of the right one (None where they are not known).

    `too_long`: document and answer are longer than the model's context, so that it was not asked.
    """

    length: int
    depth: float
    correct: bool
    nats: float | None
    tokens: int | None
    reply: str
    too_long: bool = False


@dataclass(frozen=True)
class Cell:
    """The answers of one length and depth (None: of all depths). Loss in nats per token of the right answers.

    `too_long`: how many documents do not fit into the model's context. They count as not found, and not in the loss.
    """

    length: int
    depth: float | None
    accuracy: Interval
    loss: float | None
    too_long: int


async def find_needles(
    problems: Sequence[Problem],
    backend: Backend,
    reader: Reader | None,
    *,
    at_once: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> list[Needle]:
    """Ask for each fact, and score the right answer.

    reader: for a model in this process, whose text is completed and scored; None: it takes messages, and there is no
    loss. Raises: DataError for a problem without length or depth; EndpointError.
    """
    placed = [(problem, *_place(problem)) for problem in problems]
    limit = asyncio.Semaphore(at_once)

    async def one(problem: Problem, length: int, depth: float) -> Needle:
        async with limit:
            nats = tokens = None
            try:
                if reader is not None:
                    score = await backend.score(reader.render(problem.prompt) + lead(problem), problem.answer)
                    nats, tokens = -sum(token.logprob for token in score.tokens), len(score.tokens)
                reply = await _reply(problem, backend, reader)
            except ContextExceeded:
                advance()
                return Needle(length, depth, False, None, None, "", too_long=True)
        advance()
        found = is_found(problem.answer, reply) or is_found(f"{lead(problem)}{problem.answer}".strip(), reply)
        return Needle(length, depth, found, nats, tokens, reply)

    tasks = [asyncio.create_task(one(*place)) for place in placed]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def is_found(answer: str, reply: str) -> bool:
    """Whether the reply has the answer, neither as a part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None


def cells(needles: Sequence[Needle]) -> Iterator[Cell]:
    """For each length: each depth, then all depths; Wilson intervals."""
    for length in sorted({needle.length for needle in needles}):
        here = [needle for needle in needles if needle.length == length]
        for depth in (*sorted({needle.depth for needle in here}), None):
            some = [needle for needle in here if depth is None or needle.depth == depth]
            share, left_out = wilson(sum(needle.correct for needle in some), len(some)), sum(n.too_long for n in some)
            yield Cell(length, depth, share, _loss(some), left_out)


def _loss(needles: Sequence[Needle]) -> float | None:
    known = [(needle.nats, needle.tokens) for needle in needles if needle.nats is not None and needle.tokens]
    return sum(nats for nats, _ in known) / sum(tokens for _, tokens in known) if known else None


async def _reply(problem: Problem, backend: Backend, reader: Reader | None) -> str:
    longest = ROOM * (1 + len(lead(problem) + problem.answer))
    if reader is None:
        messages = [{"role": "user", "content": problem.prompt}]
        request = Request(messages=messages, temperature=0.0, max_tokens=longest)
    else:
        text = reader.render(problem.prompt)
        room = reader.room(text)
        request = Request(prompt=text, temperature=0.0, max_tokens=longest if room is None else min(longest, room))
    (completion,) = await backend.complete(request)
    return completion.text


def lead(problem: Problem) -> str:
    """What a reply says before the answer, if the model was taught to."""
    return str(problem.metadata.get("lead", ""))


def _place(problem: Problem) -> tuple[int, float]:
    metadata: Mapping[str, object] = problem.metadata
    length, depth = metadata.get("length"), metadata.get("depth")
    if not isinstance(length, int) or not isinstance(depth, int | float):
        raise DataError(
            f"problem {problem.id}: metadata has no length and depth, got {dict(metadata)}",
            hint="luthier long-data makes such problems",
        )
    return length, float(depth)
