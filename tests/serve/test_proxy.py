"""The proxy as a running server, with the official OpenAI client in front and a simulated model behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from luthier.llm.scripted import ScriptedBackend
from luthier.llm.stub_server import StubServer
from luthier.llm.types import GO_ON
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.serve.app import Settings, create_app
from luthier.serve.in_process import Local
from luthier.serve.upstream import Server, Upstream

CHAIN = Chain.draw(5, 1)
ASKED: list[Any] = [{"role": "user", "content": CHAIN.question}]


def running(make: Callable[[], Upstream], **options: Any) -> contextlib.AbstractContextManager[str]:
    """The base URL of a proxy in a thread of its own."""
    return _serving(create_app(make(), Settings(**options)))


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[str]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


class Behind:
    """A stub server in a thread of its own."""

    def __init__(self, stub: StubServer) -> None:
        self.stub = stub
        self._loop, self._over, self._ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        async with self.stub:
            self._ready.set()
            await self._over.wait()

    def __enter__(self) -> StubServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self.stub

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def upstream() -> Iterator[StubServer]:
    with Behind(StubServer(SimulatedSolver(Habits(error=0.2)).reply, model="org/stub")) as stub:
        yield stub


@pytest.fixture(scope="module")
def proxy(upstream: StubServer) -> Iterator[str]:
    with running(lambda: Server(upstream.url, key="k")) as url:
        yield url


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="secret", max_retries=0)


def test_every_method_is_a_model(proxy: str) -> None:
    with client(proxy) as one:
        names = [model.id for model in one.models.list()]
    assert names[0] == "org/stub"
    assert {"ssr/org/stub", "ssr-ada/org/stub", "mctsr/org/stub"} <= set(names)
    assert httpx.get(proxy.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_a_reasoner_answers_with_all_tokens_counted(proxy: str, upstream: StubServer) -> None:
    before = upstream.ledger.completion_tokens
    with client(proxy) as one:
        answer = one.chat.completions.create(model="ssr/org/stub", messages=ASKED, seed=3)
    assert answer.choices[0].message.content is not None
    assert CHAIN.answer in answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == upstream.ledger.completion_tokens - before
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    extra = answer.model_extra["luthier"] if answer.model_extra else {}
    assert extra["answer"] == CHAIN.answer
    assert len(extra["steps"]) == 5
    assert extra["stop"] == "agreed"


def test_progress_is_streamed_before_the_answer(proxy: str) -> None:
    with client(proxy) as one:
        events = list(
            one.chat.completions.create(
                model="ssr-lin:rounds=4/org/stub",
                messages=ASKED,
                stream=True,
                stream_options={"include_usage": True},
                seed=3,
            )
        )
    deltas = [event.choices[0].delta for event in events if event.choices]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    text = "".join(delta.content or "" for delta in deltas)
    assert "Step 1 (" in thoughts
    assert f"<answer>{CHAIN.answer}</answer>" in text
    first_text = next(number for number, delta in enumerate(deltas) if delta.content)
    assert any(getattr(delta, "reasoning_content", None) for delta in deltas[:first_text])
    assert events[-1].usage is not None
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"


def test_the_async_client_asks_in_parallel(proxy: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=proxy, api_key="k", max_retries=0) as one:
            answers = await asyncio.gather(
                *(
                    one.chat.completions.create(model=f"{method}/org/stub", messages=ASKED)
                    for method in ("cot", "maj@3", "ssr-lin:preset=paper,rounds=1")
                )
            )
            return [answer.choices[0].message.content or "" for answer in answers]

    assert all("<answer>" in text for text in asyncio.run(run()))


def test_plain_models_pass_through(proxy: str, upstream: StubServer) -> None:
    with client(proxy) as one:
        answer = one.chat.completions.create(model="org/stub", messages=_solve_prompt())
    assert answer.id.startswith("stub-")
    assert "<answer>" in (answer.choices[0].message.content or "")


def _solve_prompt() -> list[Any]:
    from luthier.reason.prompts import FULL

    return [dict(message) for message in FULL.solve(CHAIN.question)]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "ssr/org/stub", "n": 2}, 400, "n: ssr/org/stub cannot do this"),
        ({"model": "ssr/org/stub", "tools": [{"type": "function"}]}, 400, "cannot call tools"),
        ({"model": "ssr/org/stub", "messages": []}, 400, "no messages"),
        ({"model": "ssr/org/stub", "messages": [{"role": "tool", "content": "x"}]}, 400, "cannot call tools"),
        ({"model": "ssr/org/stub", "messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0]"),
        ({"model": "ssr/org/stub", "stop": ["x"]}, 400, "stop: ssr/org/stub cannot do this"),
        ({"model": "ssr-adda/org/stub"}, 404, "did you mean 'ssr-ada'"),
        ({"model": "vote@3/org/stub"}, 404, "the methods: ssr"),
        ({"model": "ssr/org/stub", "messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
        ({"model": "ssr:rouns=3/org/stub"}, 404, "did you mean 'rounds'"),
        ({"model": ""}, 400, "names no model"),
        ({"model": "ssr/org/stub", "temperature": "hot"}, 400, "temperature"),
        ({"model": "ssr/org/stub", "temperature": -1}, 400, "temperature"),
    ],
)
def test_what_cannot_be_done_is_said_as_openai_would(proxy: str, body: Any, status: int, message: str) -> None:
    with httpx.Client(base_url=proxy, timeout=60) as one:
        response = one.post("/chat/completions", json={"messages": ASKED, **body})
        assert response.status_code == status
        assert message in response.json()["error"]["message"]
        assert one.post("/chat/completions", content=b"{").status_code == 400
        assert one.get("/nothing").json()["error"]["type"] == "invalid_request_error"


def test_tools_reach_the_plain_model_where_asked_for(upstream: StubServer) -> None:
    with running(lambda: Server(upstream.url), tools="pass") as url:
        body = {"model": "ssr/org/stub", "messages": _solve_prompt(), "tools": [{"type": "function"}]}
        answer = httpx.post(f"{url}/chat/completions", json=body).json()
    assert answer["id"].startswith("stub-")


class Echo:
    """An upstream that notes what came and answers with what it was told to."""

    def __init__(self, status: int = 200, delay: float = 0.0) -> None:
        self.status, self.delay, self.seen = status, delay, list[tuple[dict[str, str], bytes]]()
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        self.seen.append(({k.decode(): v.decode() for k, v in scope["headers"]}, body))
        if self.delay:
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"7"), (b"x-request-id", b"r1")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{ "error": {"message": "no such key"} }'})


def test_a_plain_request_and_its_answer_are_not_touched() -> None:
    echo = Echo(429)
    body = b'{"model": "m",  "messages": [], "unknown_to_us": 1.50}'
    headers = {"api-key": "k", "openai-organization": "o", "cookie": "c"}
    with _serving(echo) as behind, running(lambda: Server(behind, key="own")) as url:
        response = httpx.post(f"{url}/chat/completions", content=body, headers=headers)
    (seen,) = echo.seen
    assert seen[1] == body
    assert (seen[0]["api-key"], seen[0]["openai-organization"]) == ("k", "o")
    assert not {"cookie", "authorization"} & seen[0].keys()  # the client has a key of its own
    assert response.status_code == 429
    assert response.content == b'{ "error": {"message": "no such key"} }'
    assert (response.headers["retry-after"], response.headers["x-request-id"]) == ("7", "r1")


@pytest.mark.parametrize("model", ["m", "ssr/m"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_keeps_its_status(model: str, stream: bool) -> None:
    refused = pytest.raises(openai.AuthenticationError, match="no such key")
    with _serving(Echo(401)) as behind, running(lambda: Server(behind)) as url, client(url) as one, refused:
        one.chat.completions.create(model=model, messages=ASKED, stream=stream)


def comes_true(what: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it does so in time."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def leave(url: str, body: Any, *, once: Callable[[], bool]) -> None:
    """Ask, and close the connection as soon as something is the case: no clock decides, however busy the machine."""
    where, content = httpx.URL(url), json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.host}\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection((where.host, where.port or 80)) as connection:
        connection.sendall((head + content).encode())
        assert comes_true(once)


def test_a_client_that_leaves_cancels_a_plain_call() -> None:
    echo = Echo(delay=30)
    with _serving(echo) as behind, running(lambda: Server(behind)) as url:
        leave(url, {"model": "m", "messages": ASKED}, once=lambda: bool(echo.seen))
        assert echo.left.wait(20)


def test_the_server_limits_what_a_request_may_cost(upstream: StubServer) -> None:
    with running(lambda: Server(upstream.url), limits={"max_calls": 2}) as url, client(url) as one:
        answer = one.chat.completions.create(model="ssr/org/stub", messages=ASKED)
    assert answer.model_extra is not None
    assert (answer.model_extra["luthier"]["calls"], answer.model_extra["luthier"]["stop"]) == (2, "budget")


def test_an_upstream_that_is_down_is_a_bad_gateway() -> None:
    with running(lambda: Server("http://127.0.0.1:9/v1")) as url:
        for model in ("stub", "ssr/stub"):
            response = httpx.post(f"{url}/chat/completions", json={"model": model, "messages": ASKED}, timeout=60)
            assert response.status_code == 502
            assert response.json()["error"]["type"] == "upstream_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_calls_made_for_it(stream: bool) -> None:
    backend = ScriptedBackend(lambda request, index: "<answer>1</answer>", model="slow", delay=30.0)
    with running(lambda: Local(backend), alive_every=0.2) as url:
        body = {"model": "maj@3/slow", "messages": ASKED, "stream": stream}
        leave(url, body, once=lambda: backend.in_flight > 0)
        assert comes_true(lambda: backend.in_flight == 0)


def test_a_model_in_this_process_is_served_plain_and_reasoning() -> None:
    backend = ScriptedBackend(lambda request, index: "It is <answer>4</answer>", model="local")
    with running(lambda: Local(backend)) as url, client(url) as one:
        for model in ("local", "maj@3/local"):
            answer = one.chat.completions.create(model=model, messages=ASKED)
            assert answer.choices[0].message.content == "It is <answer>4</answer>"
        usage = {"include_usage": True}
        pieces = list(one.chat.completions.create(model="local", messages=ASKED, stream=True, stream_options=usage))  # type: ignore[call-overload]
        said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(said) == "It is <answer>4</answer>"
        assert pieces[-1].usage.completion_tokens > 0
        with pytest.raises(openai.BadRequestError, match="logit_bias"):
            one.chat.completions.create(model="local", messages=ASKED, logit_bias={"1": 5})
        with pytest.raises(openai.NotFoundError, match="only 'local'"):
            one.chat.completions.create(model="ssr/other", messages=ASKED)


def test_a_reply_that_was_begun_is_gone_on_with() -> None:
    backend = ScriptedBackend(lambda request, index: " 4", model="local")
    begun = [*ASKED, {"role": "assistant", "content": "2+2 ="}]
    with running(lambda: Local(backend)) as url, client(url) as one:
        one.chat.completions.create(model="local", messages=begun, extra_body=dict(GO_ON))
        one.chat.completions.create(model="local", messages=ASKED, extra_body={"add_generation_prompt": True})
        with pytest.raises(openai.BadRequestError, match="one of the two"):
            one.chat.completions.create(model="local", messages=begun, extra_body={"add_generation_prompt": False})
    gone_on, fresh = backend.requests
    assert (gone_on.extra, gone_on.messages[-1]["content"], fresh.extra) == (GO_ON, "2+2 =", {})


def test_the_system_prompt_and_the_history_reach_the_model() -> None:
    backend = ScriptedBackend(lambda request, index: "<answer>4</answer>", model="local")
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
    ]
    with running(lambda: Local(backend)) as url, client(url) as one:
        one.chat.completions.create(model="cot/local", messages=turns, temperature=0.1, max_tokens=7)
    (request,) = backend.requests
    assert [message["content"] for message in request.messages[:3]] == ["Be brief.", "Hi", "Hello"]
    assert "2+2?" in request.messages[3]["content"]
    assert (request.temperature, request.max_tokens) == (0.1, 7)
