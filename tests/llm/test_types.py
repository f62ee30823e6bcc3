from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from luthier.core.errors import ConfigError
from luthier.llm import Completion, Request, Score, TokenLogprob, Usage, json_schema, request_key
from luthier.llm.types import score_key

HELLO = [{"role": "user", "content": "Hello"}]


def test_completion_and_score_survive_json() -> None:
    token = TokenLogprob(token="é", logprob=-0.25, token_id=7, bytes=(195, 169), top=(("é", -0.25), ("e", -2.0)))
    completion = Completion(
        text="é", finish_reason="length", index=3, logprobs=(token,), usage=Usage(prompt_tokens=2, calls=1)
    )
    assert Completion.from_json(json.loads(json.dumps(completion.to_json()))) == completion
    score = Score(tokens=(token, token), greedy=True)
    assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score
    assert score.logprob == -0.5


def test_usage_adds_every_field() -> None:
    one = Usage(prompt_tokens=1, completion_tokens=2, reasoning_tokens=3, calls=4, unreported=5)
    assert one + one == Usage(prompt_tokens=2, completion_tokens=4, reasoning_tokens=6, calls=8, unreported=10)


def test_key_is_stable_across_versions() -> None:
    assert (
        request_key("m", Request(messages=HELLO, seed=1), 0)
        == "c469f2b16fd7993c835b2373d556d388ec3fcc26269b826ff3dad843c1fe61ae"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Hullo"}]},
        {"messages": [{"role": "system", "content": "Hello"}]},
        {"max_tokens": 7},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"stop": ["x"]},
        {"seed": 2},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"require_format": False},
        {"extra": {"reasoning_effort": "low"}},
    ],
)
def test_key_depends_on_everything_that_shapes_a_sample(change: dict[str, Any]) -> None:
    request = Request(messages=HELLO, seed=1)
    assert request_key("m", replace(request, **change), 0) != request_key("m", request, 0)


def test_key_depends_on_model_and_index_but_not_on_the_number_of_samples() -> None:
    request = Request(messages=HELLO)
    assert request_key("m", request, 0) != request_key("n", request, 0)
    assert request_key("m", request, 0) != request_key("m", request, 1)
    assert request_key("m", request, 1) == request_key("m", replace(request, n=5, first_sample=1), 1)


def test_equal_requests_written_differently_have_one_key() -> None:
    a = Request(messages=HELLO, temperature=0, top_p=1, stop="x")
    b = Request(messages=({"content": "Hello", "role": "user"},), temperature=0.0, stop=("x",))
    assert a == b
    assert request_key("m", a, 0) == request_key("m", b, 0)


def test_raw_prompt_and_message_differ() -> None:
    assert request_key("m", Request(prompt="Hello"), 0) != request_key("m", Request(messages=HELLO), 0)
    assert score_key("m", "a", "bc") != score_key("m", "ab", "c")


def test_a_request_does_not_change_with_the_callers_list() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    request = Request(messages=messages)
    messages[0]["content"] = "changed"
    assert request.messages[0]["content"] == "Hello"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "neither"),
        ({"messages": HELLO, "prompt": "x"}, "both"),
        ({"messages": [{"role": "user"}]}, "message 0"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0"),
        ({"prompt": "x", "n": 0}, "n is 0"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_logprobs": 3}, "top_logprobs"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "xml"),
    ],
)
def test_impossible_requests_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        Request(**settings)
    assert caught.value.hint


def test_json_schema_has_openai_form() -> None:
    schema = json_schema("answer", {"type": "object"})
    assert schema["type"] == "json_schema"
    assert schema["json_schema"] == {"name": "answer", "schema": {"type": "object"}, "strict": True}


def test_everything_but_the_local_model_works_without_torch() -> None:
    code = (
        "import sys, luthier.llm as llm; llm.Endpoint; llm.CachedBackend; llm.ScriptedBackend; import luthier.cli.chat;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_public_names_resolve_and_others_do_not() -> None:
    import luthier.llm

    assert all(hasattr(luthier.llm, name) for name in luthier.llm.__all__)
    assert not hasattr(luthier.llm, "Nonsense")
