"""StubServer: an OpenAI-compatible server around a function, with a ledger and faults on demand.

For tests, benchmarks and trying things out where no model is at hand. One file, the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.llm.types import Message

Reply = Callable[[Sequence[Message], int | None, int], str]


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often (0 to 1) a request goes wrong, and what the server cannot do."""

    dropped: float = 0.0
    """The connection closes without an answer."""
    errors: float = 0.0
    """500."""
    limited: float = 0.0
    """429 with Retry-After."""
    retry_after: float = 0.0
    """Seconds named in Retry-After."""
    truncated: float = 0.0
    """200 with half of the JSON."""
    hanging: float = 0.0
    """No answer ever."""
    one_choice: bool = False
    """`n` is ignored: one choice comes back."""


@dataclass
class Ledger:
    """What the server delivered in whole answers (tokens are words), and how often it was asked."""

    requests: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    most_in_flight: int = 0
    seconds: float = 0.0
    """From requests read to answers ready, summed: the latency that clients were really given."""


@dataclass
class StubServer:
    """`reply(messages, seed, sample index)` behind /v1/chat/completions on a free local port.

    Use it as an async context manager, or `with stub.running()`. `latency`: seconds before each answer.
    """

    reply: Reply
    latency: float = 0.0
    faults: Faults = Faults()
    model: str = "stub"
    seed: int = 0
    port: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    async def __aenter__(self) -> StubServer:
        self._random = random.Random(self.seed)
        self._in_flight = 0
        self._clients: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._server.wait_closed()

    @contextlib.contextmanager
    def running(self) -> Iterator[StubServer]:
        """The server in a thread with an event loop of its own, for callers that have none."""
        ready, loop = threading.Event(), asyncio.new_event_loop()
        over = asyncio.Event()

        async def serve() -> None:
            async with self:
                ready.set()
                await over.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        if not ready.wait(10):
            raise TimeoutError("the stub server did not start")
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join(10)
            loop.close()

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lengths = [line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0])) if lengths else b""
                answer = await self._answer(head.split(" ", 2)[1], body)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, path: str, body: bytes) -> bytes | None:
        """The bytes of a response; None closes the connection."""
        if path.endswith("/models"):
            return _response(200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
        if not path.endswith("/chat/completions"):
            return _response(404, {"error": {"message": f"no such path: {path}", "type": "invalid_request_error"}})
        self.ledger.requests += 1
        self._in_flight += 1
        began = time.monotonic()
        self.ledger.most_in_flight = max(self.ledger.most_in_flight, self._in_flight)
        try:
            return await self._complete(json.loads(body))
        finally:
            self._in_flight -= 1
            self.ledger.seconds += time.monotonic() - began

    async def _complete(self, asked: Mapping[str, Any]) -> bytes | None:
        faults, luck = self.faults, self._random.random()
        if self.latency:
            await asyncio.sleep(self.latency)
        for share, response in (
            (faults.dropped, None),
            (faults.errors, _response(500, {"error": {"message": "broken for now", "type": "server_error"}})),
            (faults.limited, _limited(faults.retry_after)),
        ):
            if luck < share:
                return response
            luck -= share
        if luck < faults.hanging:
            await asyncio.sleep(3600)
        whole = _response(200, self._completion(asked))
        if 0 <= luck - faults.hanging < faults.truncated:
            head, _, content = whole.partition(b"\r\n\r\n")
            half = content[: len(content) // 2]
            return (
                head.replace(f"Length: {len(content)}".encode(), f"Length: {len(half)}".encode()) + b"\r\n\r\n" + half
            )
        return whole

    def _completion(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        n = 1 if self.faults.one_choice else asked.get("n") or 1
        texts = [self.reply(asked["messages"], asked.get("seed"), index) for index in range(n)]
        prompt = sum(len(message["content"].split()) for message in asked["messages"])
        written = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        self.ledger.answered += 1
        self.ledger.prompt_tokens += prompt
        self.ledger.completion_tokens += written
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ]
        name = f"stub-{self.ledger.answered}"
        return {"id": name, "object": "chat.completion", "created": 0, "model": self.model, "choices": choices} | {
            "usage": usage
        }


def _limited(retry_after: float) -> bytes:
    body = {"error": {"message": "slow down", "type": "rate_limit_error"}}
    return _response(429, body, f"Retry-After: {retry_after:g}\r\n")


def _response(status: int, body: Mapping[str, Any], headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} Stub\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    )
    return head.encode() + content
