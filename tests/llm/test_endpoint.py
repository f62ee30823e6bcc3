"""Endpoint against fake servers: one handler per dialect and per way of failing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from luthier.core.errors import ConfigError, EndpointError
from luthier.llm import Endpoint, Request, RequestFailed, json_schema
from luthier.llm.dialect import sample_seed

Result = TypeVar("Result")
ASK = Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=9)
KEY = "sk-secret-0123456789"


def answer(*texts: str, usage: bool = True, **choice: Any) -> dict[str, Any]:
    """A chat.completion payload."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | choice
        for i, text in enumerate(texts)
    ]
    counts = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return {"object": "chat.completion", "choices": choices} | ({"usage": counts} if usage else {})


@dataclass(frozen=True)
class Said:
    """An answer that is more than JSON with status 200."""

    status: int
    text: str = ""
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        text, headers = self.text, dict(self.headers)
        if self.json is not None:
            text, headers = json.dumps(self.json), {"content-type": "application/json", **headers}
        return web.Response(status=self.status, body=text.encode(), headers=headers)


Reply = Callable[[dict[str, Any]], Said | dict[str, Any]]


@contextlib.asynccontextmanager
async def serving(handle: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The URL of a server that answers everything by `handle(request)`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server:
        yield str(server.make_url("/v1"))


def openai_error(status: int, message: str, **more: Any) -> Said:
    return Said(status, json={"error": {"message": message, "type": "invalid_request_error", **more}})


class FakeServer:
    """Keeps the bodies it was sent; answers with `reply(body)`; keeps the waits that the client made."""

    def __init__(self, reply: Reply, **options: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.waits: list[float] = []
        self._reply = reply
        self._options = {"api_key": KEY, "jitter_seed": 0} | options

    def run(self, use: Callable[[Endpoint], Coroutine[Any, Any, Result]]) -> Result:
        async def main() -> Result:
            async with serving(self._handle) as url:
                endpoint = Endpoint(url, "m", sleep=self._sleep, **self._options)
                try:
                    return await use(endpoint)
                finally:
                    await endpoint.aclose()

        return asyncio.run(main())

    def complete(self, request: Request = ASK) -> list[Any]:
        return self.run(lambda endpoint: endpoint.complete(request))

    async def _handle(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        self.headers.append(request.headers)
        self.bodies.append(json.loads(await request.read() or "{}"))
        reply = self._reply(self.bodies[-1])
        return (reply if isinstance(reply, Said) else Said(200, json=reply)).response()

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def refusing(parameter: str, message: str, **more: Any) -> Reply:
    """A server that knows all but one parameter."""
    return lambda body: openai_error(400, message, **more) if parameter in body else answer("ok")


# --- what is sent and what comes back -------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    server = FakeServer(lambda body: answer("Hi"))
    (completion,) = server.complete()
    assert (completion.text, completion.finish_reason, completion.index) == ("Hi", "stop", 0)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.calls) == (11, 7, 1)
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "Hello"}],
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 9,
        }
    ]


def test_all_parameters_are_sent() -> None:
    server = FakeServer(lambda body: answer("Hi"))
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": "\n", "seed": 5}
    server.complete(Request(messages=ASK.messages, extra={"min_p": 0.1}, **sampling))
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["stop"]) == (0.5, 0.9, 4, ["\n"])
    assert (body["seed"], body["min_p"]) == (5, 0.1)
    assert "max_tokens" not in body


def test_samples_in_one_call_with_usage_that_adds_up() -> None:
    server = FakeServer(lambda body: answer(*"abc"[: body["n"]]))
    completions = server.complete(Request(messages=ASK.messages, n=3, first_sample=2))
    assert [(c.text, c.index) for c in completions] == [("a", 2), ("b", 3), ("c", 4)]
    assert [c.usage.completion_tokens for c in completions] == [3, 2, 2]
    assert [c.usage.prompt_tokens for c in completions] == [11, 0, 0]
    assert len(server.bodies) == 1


def test_a_server_that_ignores_n_is_asked_again_and_remembered() -> None:
    server = FakeServer(lambda body: answer(f"seed {body['seed']}"))

    async def twice(endpoint: Endpoint) -> list[Any]:
        first = await endpoint.complete(Request(messages=ASK.messages, n=3, seed=1))
        return [first, await endpoint.complete(Request(messages=ASK.messages, n=2, seed=1))]

    first, second = server.run(twice)
    assert [c.index for c in first] == [0, 1, 2]
    assert len({c.text for c in first}) == 3, "emulated samples need seeds of their own"
    assert [c.text for c in second] == [c.text for c in first[:2]]
    assert ["n" in body for body in server.bodies] == [True, False, False, False, False]


def test_a_server_that_refuses_n() -> None:
    def llama_cpp(body: dict[str, Any]) -> Any:
        return openai_error(500, "Only one completion choice is allowed") if "n" in body else answer("x")

    assert len(FakeServer(llama_cpp).complete(Request(messages=ASK.messages, n=3))) == 3


def test_greedy_samples_are_asked_one_by_one() -> None:
    server = FakeServer(lambda body: answer("x"))
    assert len(server.complete(Request(messages=ASK.messages, n=2, temperature=0))) == 2
    assert not any("n" in body for body in server.bodies)


def test_raw_completion() -> None:
    server = FakeServer(
        lambda body: {"choices": [{"text": " world", "index": 0, "finish_reason": "length"}], "usage": None}
    )
    (completion,) = server.complete(Request(prompt="Hello", max_tokens=1))
    assert (completion.text, completion.finish_reason, completion.usage.unreported) == (" world", "length", 1)
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == "Hello"


# --- dialects --------------------------------------------------------------------------------------------------------


def test_max_completion_tokens_is_learned_once() -> None:
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server = FakeServer(refusing("max_tokens", message, param="max_tokens", code="unsupported_parameter"))

    async def twice(endpoint: Endpoint) -> None:
        await endpoint.complete(ASK)
        await endpoint.complete(ASK)

    server.run(twice)
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 9, 9]
    assert server.waits == []


def test_a_limit_that_is_too_large_is_not_a_dialect() -> None:
    server = FakeServer(lambda body: openai_error(400, "max_tokens is too large: 9. At most 4 completion tokens."))
    with pytest.raises(RequestFailed, match="too large"):
        server.complete()
    assert len(server.bodies) == 1


TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0.6 with this model. Only the default (1) is supported."
)


def test_refused_temperature_is_an_error_unless_neutral_or_allowed() -> None:
    def server(**options: Any) -> FakeServer:
        return FakeServer(refusing("temperature", TEMPERATURE, param="temperature"), **options)

    warm = Request(messages=ASK.messages, temperature=0.6)
    assert server().complete(ASK)[0].text == "ok"
    assert server(ignore_unsupported=["temperature"]).complete(warm)[0].text == "ok"
    with pytest.raises(RequestFailed, match=r"temperature=0\.6") as caught:
        server().complete(warm)
    assert "ignore_unsupported" in caught.value.hint

    async def learned_from_another(endpoint: Endpoint) -> None:
        await endpoint.complete(ASK)
        await endpoint.complete(warm)

    with pytest.raises(RequestFailed, match=r"temperature=0\.6"):
        server().run(learned_from_another)


def test_ignore_unsupported_is_checked() -> None:
    with pytest.raises(ConfigError, match="messages"):
        Endpoint("http://x", "m", ignore_unsupported=["messages"])


SCHEMA = json_schema("answer", {"type": "object"})


def test_structured_output_goes_down_only_with_consent() -> None:
    def only(kind: str) -> FakeServer:
        def reply(body: dict[str, Any]) -> Any:
            wanted = body.get("response_format", {"type": "text"})["type"]
            fine = wanted in (kind, "text")
            return answer("{}") if fine else openai_error(400, f"response_format type {wanted} is not supported")

        return FakeServer(reply)

    weak = Request(messages=ASK.messages, response_format=SCHEMA, require_format=False)
    assert only("json_schema").complete(weak)[0].format == "json_schema"
    assert only("json_object").complete(weak)[0].format == "json_object"
    assert only("text").complete(weak)[0].format == "text"
    with pytest.raises(RequestFailed, match="cannot enforce response_format 'json_schema'"):
        only("json_object").complete(Request(messages=ASK.messages, response_format=SCHEMA))


def test_fastapi_validation_errors_name_the_parameter() -> None:
    def reply(body: dict[str, Any]) -> Any:
        detail = [{"loc": ["body", "top_p"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]
        return Said(422, json={"detail": detail}) if "top_p" in body else answer("ok")

    assert FakeServer(reply).complete()[0].text == "ok"


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again_with_growing_waits(status: int) -> None:
    replies = iter([Said(status, text="busy")] * 3 + [Said(200, json=answer("ok"))])
    server = FakeServer(lambda body: next(replies))
    assert server.complete()[0].text == "ok"
    ranges = [(0.25, 0.5), (0.5, 1.0), (1.0, 2.0)]
    assert all(low <= wait <= high for wait, (low, high) in zip(server.waits, ranges, strict=True))


def test_waits_are_reproducible() -> None:
    def waits() -> list[float]:
        server = FakeServer(lambda body: Said(503, text="busy"), max_retries=3)
        with pytest.raises(RequestFailed, match="after 4 tries"):
            server.complete()
        return server.waits

    assert waits() == waits()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_hopeless_failures_are_not_tried_again(status: int) -> None:
    server = FakeServer(lambda body: openai_error(status, "no"))
    with pytest.raises(RequestFailed, match=f"{status}: no") as caught:
        server.complete()
    assert caught.value.status == status
    assert caught.value.hint
    assert server.paths.count("/v1/chat/completions") == 1


def test_retry_after_is_honored_and_absurd_ones_are_an_error() -> None:
    replies = iter([Said(429, text="slow", headers={"retry-after": "7"}), Said(200, json=answer("ok"))])
    server = FakeServer(lambda body: next(replies))
    server.complete()
    assert server.waits == [7.0]
    hidden = {"error": {"message": "slow", "code": 429}}  # some gateways send it with status 200
    replies = iter([Said(200, json=hidden, headers={"retry-after": "7"}), Said(200, json=answer("ok"))])
    server = FakeServer(lambda body: next(replies))
    server.complete()
    assert server.waits == [7.0]
    hours = FakeServer(lambda body: Said(429, text="slow", headers={"retry-after": "7200"}))
    with pytest.raises(RequestFailed, match="429"):
        hours.complete()


def test_an_empty_account_is_not_tried_again() -> None:
    server = FakeServer(lambda body: openai_error(429, "You exceeded your quota", code="insufficient_quota"))
    with pytest.raises(RequestFailed, match="quota") as caught:
        server.complete()
    assert "credit" in caught.value.hint
    assert len(server.bodies) == 1


def test_401_says_which_variable_and_never_shows_the_key() -> None:
    server = FakeServer(lambda body: openai_error(401, f"Incorrect API key provided: {KEY}."))
    with pytest.raises(RequestFailed) as caught:
        server.complete()
    assert "OPENAI_API_KEY" in caught.value.hint
    assert KEY not in f"{caught.value} {caught.value.hint} {caught.value!r}"


def test_repr_hides_the_key_and_the_environment_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = FakeServer(lambda body: answer("x"), api_key=None)

    async def main(endpoint: Endpoint) -> tuple[str, str]:
        await endpoint.complete(ASK)
        return repr(endpoint), endpoint.url

    shown, url = server.run(main)
    assert shown == f"Endpoint({url!r}, 'm')"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_404_lists_the_models() -> None:
    def reply(body: dict[str, Any]) -> Any:
        return openai_error(404, "no such model") if body else {"data": [{"id": "m2"}, {"id": "other"}]}

    with pytest.raises(RequestFailed) as caught:
        FakeServer(reply).complete()
    assert "did you mean 'm2'?" in caught.value.hint
    assert "other" in caught.value.hint


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        ({"error": {"message": "upstream died", "code": 502}}, "502: upstream died"),
        ({"object": "chat.completion", "choices": []}, "without any choice"),
        (answer("", message={"role": "assistant", "content": None}), "without content"),
        (answer("x", finish_reason="exploded"), "exploded"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_a_success_that_is_none_is_an_error(payload: Any, named: str) -> None:
    with pytest.raises(EndpointError, match=named):
        FakeServer(lambda body: Said(200, json=payload)).complete()


def test_a_web_page_is_an_error() -> None:
    with pytest.raises(RequestFailed, match="not a JSON object") as caught:
        FakeServer(lambda body: Said(200, text="<html>It works!</html>")).complete()
    assert "/v1" in caught.value.hint


def test_samples_that_succeeded_survive_the_failure_of_another() -> None:
    def reply(body: dict[str, Any]) -> Any:
        return openai_error(400, "bad luck") if body["seed"] == bad_seed else answer("paid")

    bad_seed = sample_seed(1, 2)
    with pytest.raises(RequestFailed, match="bad luck") as caught:
        FakeServer(reply).complete(Request(messages=ASK.messages, n=4, seed=1))
    assert [c.index for c in caught.value.completions] == [0, 1, 3]


def test_concurrency_is_limited_and_usage_is_summed() -> None:
    running = {"now": 0, "most": 0}

    async def handle(request: web.Request) -> web.Response:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        await asyncio.sleep(0.005)
        running["now"] -= 1
        return web.json_response(answer("x"))

    async def main() -> Endpoint:
        async with serving(handle) as url:
            endpoint = Endpoint(url, "m", concurrency=3)
            await asyncio.gather(*(endpoint.complete(ASK) for _ in range(10)))
            await endpoint.aclose()
        return endpoint

    endpoint = asyncio.run(main())
    assert running["most"] == 3
    assert (endpoint.usage.calls, endpoint.usage.prompt_tokens) == (10, 110)


def test_cancellation_reaches_the_inner_calls() -> None:
    asked, gone = [], []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.path)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:  # the client has gone
            gone.append(request.path)
            raise
        raise AssertionError("never reached")

    async def main() -> None:
        async with serving(handle) as url:
            endpoint = Endpoint(url, "m")
            task = asyncio.create_task(endpoint.complete(Request(messages=ASK.messages, n=3, temperature=0)))
            async with asyncio.timeout(5):
                while len(asked) < 3:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                while len(gone) < 3:
                    await asyncio.sleep(0.001)
            await endpoint.aclose()

    asyncio.run(main())


# --- scores ----------------------------------------------------------------------------------------------------------


def echo(tokens: list[str], logprobs: list[float | None], generated: int) -> dict[str, Any]:
    choice = {"text": "".join(tokens), "finish_reason": "length", "index": 0}
    columns = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None}
    usage = {"prompt_tokens": 4, "completion_tokens": generated}
    return {"choices": [choice | {"logprobs": columns}], "usage": usage}


def test_score_reads_an_echo() -> None:
    server = FakeServer(lambda body: echo(["<s>", "Hello", " wor", "ld"], [None, -9.0, -1.0, -0.5], 0))
    score = server.run(lambda endpoint: endpoint.score("Hello", " world"))
    assert ([token.token for token in score.tokens], score.logprob) == ([" wor", "ld"], -1.5)
    assert server.bodies[0]["prompt"] == "Hello world"
    assert (server.bodies[0]["echo"], server.bodies[0]["max_tokens"]) == (True, 0)


def test_score_with_a_server_that_must_write_a_token() -> None:
    def reply(body: dict[str, Any]) -> Any:
        if body["max_tokens"] == 0:
            return openai_error(400, "max_tokens must be at least 1, got 0.")
        return echo(["Hello", " world", "!"], [None, -1.0, -7.0], 1)

    server = FakeServer(reply)
    assert server.run(lambda endpoint: endpoint.score("Hello", " world")).logprob == -1.0
    assert server.run(lambda endpoint: endpoint.score("Hello", " world")).logprob == -1.0


def test_score_without_echo_is_an_error() -> None:
    def llama_cpp(body: dict[str, Any]) -> Any:
        return openai_error(500, "Unsupported param: echo")

    server = FakeServer(llama_cpp)
    with pytest.raises(RequestFailed, match="cannot score"):
        server.run(lambda endpoint: endpoint.score("Hello", " world"))
    assert server.waits == []
    ignores = FakeServer(lambda body: echo(["!"], [-1.0], 0))
    with pytest.raises(RequestFailed, match="cannot find the scored text"):
        ignores.run(lambda endpoint: endpoint.score("Hello", " world"))


@pytest.mark.parametrize(("best", "greedy"), [(" wor", True), (" x", False)])
def test_score_tells_whether_its_tokens_are_the_likeliest(best: str, greedy: bool) -> None:
    reply = echo(["Hello", " wor", "ld"], [None, -1.0, -0.5], 0)
    reply["choices"][0]["logprobs"]["top_logprobs"] = [None, {" wor": -1.0, best: -0.9}, {"ld": -0.5}]
    score = FakeServer(lambda body: reply).run(lambda endpoint: endpoint.score("Hello", " world"))
    assert score.greedy is greedy
    without = FakeServer(lambda body: echo(["Hello", " world"], [None, -1.0], 0))
    assert without.run(lambda endpoint: endpoint.score("Hello", " world")).greedy is None


# --- streams -------------------------------------------------------------------------------------------------------


def sse(*events: Any) -> Said:
    lines = [": comment"] + [f"data: {event if isinstance(event, str) else json.dumps(event)}" for event in events]
    return Said(200, text="\n\n".join(lines) + "\n\n", headers={"content-type": "text/event-stream"})


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


async def streamed(endpoint: Endpoint) -> list[str]:
    return [piece async for piece in endpoint.stream(ASK)]


def test_stream_yields_pieces_and_counts_usage() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    server = FakeServer(lambda body: sse(delta(None), delta("Hel"), delta("lo"), delta("", "stop"), usage, "[DONE]"))

    async def main(endpoint: Endpoint) -> Any:
        return await streamed(endpoint), endpoint.usage

    pieces, total = server.run(main)
    assert pieces == ["Hel", "lo"]
    assert (total.calls, total.completion_tokens, total.unreported) == (1, 2, 0)
    assert server.bodies[0]["stream"] is True


def test_line_separators_inside_a_piece_do_not_end_its_line() -> None:
    text = "a\u2028b\x85c\u2029"
    event = f"data: {json.dumps(delta(text, 'stop'), ensure_ascii=False)}\r\n\r\ndata: [DONE]"
    reply = Said(200, text=event, headers={"content-type": "text/event-stream"})
    assert FakeServer(lambda body: reply).run(streamed) == [text]


def test_a_server_that_does_not_stream_gives_its_answer_in_one_piece() -> None:
    async def main(endpoint: Endpoint) -> Any:
        return await streamed(endpoint), endpoint.usage.completion_tokens

    assert FakeServer(lambda body: answer("Hello")).run(main) == (["Hello"], 7)


def test_stream_options_are_dropped_when_refused() -> None:
    def reply(body: dict[str, Any]) -> Any:
        refused = openai_error(400, "Unknown parameter: 'stream_options'", param="stream_options")
        return refused if "stream_options" in body else sse(delta("x", "stop"), "[DONE]")

    assert FakeServer(reply).run(streamed) == ["x"]


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        (sse(delta("Hel")), "broke off"),
        (sse("{bro"), "streamed '{bro'"),
        (sse("[1]"), "not a JSON object"),
        (sse(delta("Hel"), {"error": {"message": "out of memory"}}), "out of memory"),
        (openai_error(401, "who?"), "401: who"),
        (Said(200, json={"error": {"message": "upstream died", "code": 400}}), "upstream died"),
    ],
)
def test_a_broken_stream_is_an_error(reply: Said, named: str) -> None:
    with pytest.raises(RequestFailed, match=named):
        FakeServer(lambda body: reply).run(streamed)
