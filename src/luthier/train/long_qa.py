"""Synthetic questions on long documents (Instella-Long, arXiv 2511.10628; spec: section 4.4), as rows of `messages`.

Long documents: a random part on sentence borders is shown to a language model, which writes a question about it with
its answer; both follow the full document. Short documents: each gets a question; documents are joined until they reach
the length, and the question of one of them follows. So the place of the answer is uniform, and only it is trained on.

Departures: sentence borders are found by punctuation, not by NLTK; a reply that cannot be read is asked for again.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.data.long_documents import Size, cut, random_part
from luthier.llm.types import Backend, Request

PROMPT = """\
Here is an excerpt of a longer document, between the lines of dashes.

-----
{passage}
-----

Write one question that this excerpt answers, and the answer. Whoever is asked will have the whole document and will \
not know which excerpt you saw: name people, things and events so that the question can have one answer only, and do \
not speak of an excerpt. Keep the answer short and base it on the excerpt alone.

Reply with two lines and nothing else:
Question: ...
Answer: ..."""
_REPLY = re.compile(r"\s*\**Question:\**\s*(?P<question>\S.*?)\s*\n+\s*\**Answer:\**\s*(?P<answer>\S.*?)\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LongQuestions:
    """How rows are made; lengths are in what `size` counts."""

    size: Size = len
    """Length of a text."""
    length: int
    """Where a long document is cut, or what short ones reach together; the last of these is kept whole."""
    shortest: int = 0
    """Long documents below this are left out."""
    part: tuple[int, int]
    """Shortest and longest part of a long document that is asked about."""
    per_document: int = 1
    """Questions on each long document, each a row of its own."""
    attempts: int = 3
    """Times that a question is asked for until the reply can be read."""
    max_tokens: int = 512
    """Longest reply of the model, in its tokens."""
    at_once: int = 16
    """Calls in flight."""
    seed: int = 0
    """Decides parts, order and requests, so that a second run asks for nothing that is cached."""

    def __post_init__(self) -> None:
        if not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(f"part: got {self.part}, expected the shortest and the longest", hint="2000 8000")
        if min(self.length, self.per_document, self.attempts, self.max_tokens, self.at_once) < 1:
            raise ConfigError(
                "length, per_document, attempts, max_tokens and at_once must be positive", hint="raise it"
            )


@dataclass(frozen=True)
class LongRows:
    """Rows, and what did not become one: too short, without a part of that length, without a reply that can be read."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]


def read_reply(text: str) -> tuple[str, str] | None:
    """Question and answer of a reply in the form that the prompt asks for; None for any other."""
    match = _REPLY.fullmatch(text)
    return (match["question"], match["answer"]) if match and "\n" not in match["question"] else None


async def ask(passage: str, backend: Backend, settings: LongQuestions, *where: int) -> tuple[str, str] | None:
    """A question about a passage and its answer; None when no attempt gives a reply that can be read.

    Raises: EndpointError when the model fails.
    """
    message = {"role": "user", "content": PROMPT.format(passage=passage)}
    for attempt in range(settings.attempts):
        seed = derive_seed(settings.seed, "long question", *where, attempt)
        request = Request(messages=[message], temperature=0.7, max_tokens=settings.max_tokens, seed=seed)
        (completion,) = await backend.complete(request)
        if (pair := read_reply(completion.text)) is not None:
            return pair
    return None


async def long_document_rows(
    documents: Sequence[str], backend: Backend, settings: LongQuestions, advance: Callable[[], None] = lambda: None
) -> LongRows:
    """Questions on parts of long documents, each after the full one. The same arguments give the same rows."""
    left_out = {"too short": 0, "no part": 0, "no question": 0}
    jobs: list[tuple[str, str, tuple[int, int]]] = []
    for number, document in enumerate(documents):
        if settings.size(document) < settings.shortest:
            left_out["too short"] += 1
            continue
        whole = cut(document, settings.length, settings.size)
        for question in range(settings.per_document):
            rng = random.Random(derive_seed(settings.seed, "part", number, question))
            if (part := random_part(whole, *settings.part, settings.size, rng)) is None:
                left_out["no part"] += 1
            else:
                jobs.append((whole, part, (number, question)))
    pairs = await _ask_all([(part, where) for _, part, where in jobs], backend, settings, advance)
    rows = [_row(whole, *pair) for (whole, _, _), pair in zip(jobs, pairs, strict=True) if pair]
    left_out["no question"] = pairs.count(None)
    return LongRows(rows, left_out)


async def short_document_rows(
    documents: Sequence[str], backend: Backend, settings: LongQuestions, advance: Callable[[], None] = lambda: None
) -> LongRows:
    """Short documents joined until they reach the length, and the question of one of them; each is used once."""
    order = list(range(len(documents)))
    rng = random.Random(derive_seed(settings.seed, "order of short documents"))
    rng.shuffle(order)
    pairs = await _ask_all([(documents[number], (number, 0)) for number in order], backend, settings, advance)
    rows, joined, used = list[dict[str, Any]](), list[tuple[str, tuple[str, str]]](), 0
    for number, pair in zip(order, pairs, strict=True):
        if pair is None:
            continue
        joined.append((documents[number].strip(), pair))
        used += settings.size(documents[number])
        if used >= settings.length:
            _, (question, answer) = rng.choice(joined)
            rows.append(_row("\n\n".join(document for document, _ in joined), question, answer))
            joined, used = [], 0
    return LongRows(rows, {"no question": pairs.count(None), "no full row": len(joined)})


async def _ask_all(
    passages: Sequence[tuple[str, tuple[int, int]]],
    backend: Backend,
    settings: LongQuestions,
    advance: Callable[[], None],
) -> list[tuple[str, str] | None]:
    """Question and answer for each passage, in order; the first failure of the model stops all."""
    found: list[tuple[str, str] | None] = [None] * len(passages)
    waiting = iter(enumerate(passages))

    async def work() -> None:
        for place, (passage, where) in waiting:
            found[place] = await ask(passage, backend, settings, *where)
            advance()

    workers = [asyncio.create_task(work()) for _ in range(min(settings.at_once, len(passages)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return found


def _row(document: str, question: str, answer: str) -> dict[str, Any]:
    turns = (("user", f"{document.strip()}\n\n{question}"), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
