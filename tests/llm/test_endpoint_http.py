"""Endpoint over a real socket: addresses, and what only a network can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest

from luthier.core.errors import ConfigError
from luthier.llm import Endpoint, Request, RequestFailed
from luthier.llm.endpoint import normalize_url

ASK = Request(messages=[{"role": "user", "content": "Hello"}])


@contextlib.contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on localhost that answers every POST by `answer(handler)`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send_json(handler: BaseHTTPRequestHandler, text: str) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


async def immediately(seconds: float) -> None:
    return None


async def never(seconds: float) -> None:
    raise AssertionError("nothing to wait for")


def complete(url: str, sleep: Callable[[float], Awaitable[None]] = immediately, **options: Any) -> str:
    async def main() -> str:
        endpoint = Endpoint(url, "m", sleep=sleep, **{"api_key": "", **options})
        try:
            return (await endpoint.complete(ASK))[0].text
        finally:
            await endpoint.aclose()

    return asyncio.run(main())


def test_a_plain_call() -> None:
    with serving(lambda handler: send_json(handler, "Hi")) as url:
        assert complete(url) == "Hi"


def test_a_key_from_a_file_may_end_with_a_newline() -> None:
    keys: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        keys.append(handler.headers["Authorization"])
        send_json(handler, "x")

    with serving(answer) as url:
        complete(url, api_key="sk-1\n")
    assert keys == ["Bearer sk-1"]
    with pytest.raises(ConfigError, match="characters that no key has"):
        Endpoint("http://server", "m", api_key="sk-\u2026")


def test_a_body_that_cannot_be_decoded_is_an_error() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(b"not gzip")

    with serving(answer) as url, pytest.raises(RequestFailed, match="sent what cannot be read"):
        complete(url, max_retries=0)


def test_a_failure_without_words_is_named_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise aiohttp.ClientOSError

    monkeypatch.setattr(aiohttp.ClientSession, "_request", fail)
    with pytest.raises(RequestFailed, match="ClientOSError"):
        complete("http://server")


def test_connection_refused_fails_at_once_and_asks_whether_the_server_runs() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RequestFailed, match="cannot be reached") as caught:
        complete(url, never)
    assert caught.value.status is None
    assert caught.value.hint == f"is the server running at {url}?"


def test_a_slow_server_times_out_and_is_asked_again() -> None:
    calls: list[float] = []

    def slow_once(handler: BaseHTTPRequestHandler) -> None:
        calls.append(time.monotonic())
        if len(calls) == 1:
            time.sleep(0.3)
            handler.close_connection = True
        else:
            send_json(handler, "at last")

    with serving(slow_once) as url:
        assert complete(url, timeout=0.1) == "at last"
    with serving(lambda handler: time.sleep(0.2)) as url, pytest.raises(RequestFailed, match="timed out") as caught:
        complete(url, timeout=0.05, max_retries=0)
    assert "raise it" in caught.value.hint


def test_a_connection_that_breaks_in_mid_run_is_tried_again() -> None:
    calls: list[int] = []

    def break_second(handler: BaseHTTPRequestHandler) -> None:
        calls.append(1)
        if len(calls) == 2:
            handler.close_connection = True
        else:
            send_json(handler, f"answer {len(calls)}")

    async def main(url: str) -> list[str]:
        endpoint = Endpoint(url, "m", api_key="", sleep=immediately)
        texts = [(await endpoint.complete(ASK))[0].text for _ in range(2)]
        await endpoint.aclose()
        return texts

    with serving(break_second) as url:
        assert asyncio.run(main(url)) == ["answer 1", "answer 3"]


def test_pieces_arrive_while_the_server_still_writes() -> None:
    shown = threading.Event()

    def write_and_wait(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        for text, finish in (("Hel", None), ("lo", "stop")):
            event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
            handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            handler.wfile.flush()
            assert finish or shown.wait(5), "the client waits for the end of the stream"
        handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True

    async def main(url: str) -> list[str]:
        endpoint, pieces = Endpoint(url, "m", api_key=""), []
        async for piece in endpoint.stream(ASK):
            pieces.append(piece)
            shown.set()
        await endpoint.aclose()
        return pieces

    with serving(write_and_wait) as url:
        assert asyncio.run(main(url)) == ["Hel", "lo"]


def test_a_stream_that_is_cut_is_an_error() -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b'data: {"choices": [{"delta": {"content": "Hel"}}]}\n\n')
        handler.close_connection = True

    async def main(url: str) -> list[str]:
        endpoint = Endpoint(url, "m", api_key="")
        try:
            return [piece async for piece in endpoint.stream(ASK)]
        finally:
            await endpoint.aclose()

    with serving(cut) as url, pytest.raises(RequestFailed):
        asyncio.run(main(url))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("http://host/v1/chat/completions", "http://host/v1"),
        ("http://host/v1/completions", "http://host/v1"),
        ("https://host/openai/deployments/x", "https://host/openai/deployments/x"),
    ],
)
def test_urls(given: str, expected: str) -> None:
    assert normalize_url(given) == expected


@pytest.mark.parametrize("given", ["localhost:8000", "http://", "http:///v1", "http://[::1", "ftp://host/v1"])
def test_what_is_no_url_of_a_server_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(given))):
        Endpoint(given, "m")
