"""Server-sent events: progress while a reasoner works, then the answer.

Progress comes as `reasoning_content`, which clients that know it show apart from the answer and others ignore; comments
keep the connection alive in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from luthier.reason.session import Solution
from luthier.serve.answers import chunk, cut_short, event, extension, finish_reason, usage_chunk
from luthier.serve.failures import error_of
from luthier.serve.protocol import ChatRequest

DONE = b"data: [DONE]\n\n"
ALIVE = b": working\n\n"
PIECE = 400
"""Characters of the answer in one event."""
Listener = Callable[[Mapping[str, Any]], None]
Work = Callable[[Listener], Awaitable[Solution]]


async def begun(pieces: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, once the first is there: until then a failure can still have its status."""
    return _after(await anext(pieces, b""), pieces)


async def _after(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


def progress(happened: Mapping[str, Any]) -> str:
    """A trace event as a line for people, '' for most."""
    data = happened.get("data", {})
    if happened["event"] == "start" and happened.get("kind") == "round" and data.get("number"):
        return f"Round {data['number']}.\n"
    if happened["event"] != "point":
        return ""
    if happened["name"] == "proposal":
        return f"Answer so far: {data['answer'] or 'none'}.\n"
    if happened["name"] == "steps":
        return "".join(_step(step) for step in data["steps"])
    if happened["name"] == "fallback":
        return f"{data['what']}: {data['why']}.\n"
    return ""


def _step(step: Mapping[str, Any]) -> str:
    sure = "unknown" if step["confidence"] is None else f"{step['confidence']:.0%}"
    doubt = ""
    if not step["agrees"]:
        refuted = step["decided_by"] == "checker"
        doubt = ", which a checker refutes" if refuted else ""
        doubt += (
            f", but re-answers say {step['majority'] or 'something else each'}"
            if step["majority"] or not refuted
            else ""
        )
    return f"Step {step['index'] + 1} ({sure}): {step['question']} {step['answer']}{doubt}\n"


async def answer_events(request: ChatRequest, work: Work, *, alive_every: float) -> AsyncGenerator[bytes]:
    """All events of a streamed answer. Closing the iterator cancels the work.

    A failure before the first sign of life (after `alive_every` seconds at the latest) is raised, so that it can have
    its status; a later one is an event.
    """
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    cut: list[str] = []

    def listen(happened: Mapping[str, Any]) -> None:
        cut.extend(cut_short(happened))
        if text := progress(happened):
            lines.put_nowait(text)

    task = asyncio.ensure_future(work(listen))
    task.add_done_callback(lambda _: lines.put_nowait(None))
    try:
        line = await _next(lines, alive_every)
        if line is None:
            task.result()  # raises what went wrong
        yield event(chunk(request, {"role": "assistant", "content": ""}))
        while line is not None:
            yield event(chunk(request, {"reasoning_content": line})) if line else ALIVE
            line = await _next(lines, alive_every)
        for piece in _conclusion(request, task, cut):
            yield piece
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next(lines: asyncio.Queue[str | None], alive_every: float) -> str | None:
    """The next line; '' when there is none for so many seconds, None when there are no more."""
    try:
        async with asyncio.timeout(alive_every):  # wait_for may lose a cancellation in Python 3.11
            return await lines.get()
    except TimeoutError:
        return ""


def _conclusion(request: ChatRequest, task: asyncio.Future[Solution], cut: list[str]) -> Iterator[bytes]:
    try:
        solution = task.result()
    except Exception as error:
        yield event(error_of(error).body)  # the status is sent already
        return
    for start in range(0, len(solution.text), PIECE):
        yield event(chunk(request, {"content": solution.text[start : start + PIECE]}))
    last = chunk(request, {}, finish_reason(solution, cut))
    yield event({**last, "luthier": extension(request, solution)})
    if request.include_usage:
        yield event(usage_chunk(request, solution.usage))
    yield DONE
