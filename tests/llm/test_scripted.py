from __future__ import annotations

import asyncio

import pytest

from luthier.core.errors import EndpointError
from luthier.llm import Completion, Request, RequestFailed, ScriptedBackend


def test_replies_come_in_order_and_calls_are_recorded() -> None:
    backend = ScriptedBackend(["one", "two words", "three"])
    request = Request(prompt="a b c", n=2)
    first = asyncio.run(backend.complete(request))
    assert [(c.text, c.index) for c in first] == [("one", 0), ("two words", 1)]
    assert backend.requests == [request]
    assert (backend.usage.prompt_tokens, backend.usage.completion_tokens, backend.usage.calls) == (3, 3, 1)


def test_a_function_sees_request_and_sample_index() -> None:
    backend = ScriptedBackend(lambda request, index: f"{request.prompt}{index}")
    completions = asyncio.run(backend.complete(Request(prompt="x", n=2, first_sample=3)))
    assert [c.text for c in completions] == ["x3", "x4"]


def test_an_exception_is_raised_and_a_completion_passes_through() -> None:
    cut = Completion(text="cut", finish_reason="length", index=9)
    backend = ScriptedBackend([RequestFailed("down", hint="wait", status=503), cut])
    with pytest.raises(RequestFailed, match="down"):
        asyncio.run(backend.complete(Request(prompt="x")))
    (completion,) = asyncio.run(backend.complete(Request(prompt="x")))
    assert (completion.finish_reason, completion.index) == ("length", 0)


def test_a_script_that_is_over_is_an_error() -> None:
    with pytest.raises(EndpointError, match="script is over: all 1"):
        asyncio.run(ScriptedBackend(["only"]).complete(Request(prompt="x", n=2)))


def test_stream_and_score() -> None:
    backend = ScriptedBackend(["  a b\n c "], scores=lambda prompt, completion: -float(len(completion)))

    async def pieces() -> list[str]:
        return [piece async for piece in backend.stream(Request(prompt="x"))]

    assert "".join(asyncio.run(pieces())) == "  a b\n c "
    assert asyncio.run(backend.score("p", "four")).logprob == -4.0
    assert backend.scored == [("p", "four")]
    with pytest.raises(EndpointError, match="no scores"):
        asyncio.run(ScriptedBackend([]).score("p", "c"))


def test_delay_lets_calls_overlap() -> None:
    backend = ScriptedBackend(lambda request, index: "x", delay=0.01)

    async def main() -> None:
        await asyncio.gather(*(backend.complete(Request(prompt="x")) for _ in range(5)))

    asyncio.run(main())
    assert (backend.max_in_flight, backend.in_flight) == (5, 0)
