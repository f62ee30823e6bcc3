from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.llm import Completion, RequestFailed, Usage
from luthier.llm.replies import read_completions, read_event, read_fault, read_usage, split_usage


def read(choice: dict[str, Any], top: int | None = None) -> Completion:
    """The completion that a payload with this one choice becomes."""
    payload = {"choices": [{"index": 0, "finish_reason": "stop"} | choice]}
    return read_completions(payload, first=0, n=1, top=top, enforced="text")[0]


def message(content: str | None, **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content, **more}}


def test_chat_logprobs_keep_bytes_and_the_best_alternatives() -> None:
    others = [{"token": "e", "logprob": -3.0}, {"token": "é", "logprob": -0.1}]
    token = {"token": "é", "logprob": -0.1, "bytes": [195, 169], "top_logprobs": others}
    completion = read(message("é") | {"logprobs": {"content": [token]}}, top=1)
    assert completion.logprobs is not None
    assert completion.logprobs[0].bytes == (195, 169)
    assert completion.logprobs[0].top == (("é", -0.1),)


def test_legacy_logprobs() -> None:
    columns = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0, "c": -0.5}, None]}
    completion = read({"text": "ab", "logprobs": columns}, top=2)
    assert completion.logprobs is not None
    assert [(token.logprob, token.top) for token in completion.logprobs] == [
        (-1.0, (("c", -0.5), ("a", -1.0))),
        (-2.0, ()),
    ]


def test_missing_logprobs_are_an_error() -> None:
    with pytest.raises(RequestFailed, match="no log-probabilities"):
        read(message("x"), top=0)


def test_hidden_reasoning_is_kept_apart() -> None:
    for name in ("reasoning_content", "reasoning"):
        completion = read(message("4", **{name: "2+2"}))
        assert (completion.text, completion.reasoning) == ("4", "2+2")
    cut = read(message(None) | {"finish_reason": "length"})
    assert (cut.text, cut.finish_reason) == ("", "length")


def test_refusals_and_tool_calls_are_reported_as_such() -> None:
    refused = read(message(None, refusal="I cannot."))
    assert (refused.text, refused.finish_reason) == ("I cannot.", "content_filter")
    assert read(message(None) | {"finish_reason": "tool_calls"}).finish_reason == "tool_calls"


def test_an_answer_that_is_none_is_an_error() -> None:
    with pytest.raises(RequestFailed, match="without content"):
        read(message(None))
    with pytest.raises(RequestFailed, match="exploded"):
        read(message("x") | {"finish_reason": "exploded"})


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 12))
def test_split_usage_adds_up(completion_tokens: int, reasoning_tokens: int, parts: int) -> None:
    usage = Usage(
        prompt_tokens=7, completion_tokens=completion_tokens, reasoning_tokens=reasoning_tokens, calls=1, unreported=1
    )
    assert sum(split_usage(usage, parts), Usage()) == usage


def test_usage_that_is_not_reported_is_not_zero() -> None:
    assert read_usage(None) == Usage(calls=1, unreported=1)
    details = {"prompt_tokens": 1, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 4}}
    assert read_usage(details) == Usage(prompt_tokens=1, completion_tokens=5, reasoning_tokens=4, calls=1)


@pytest.mark.parametrize(
    ("text", "message", "param"),
    [
        ('{"error": {"message": "no", "param": "n"}}', "no", "n"),
        ('{"object": "error", "message": "too\\nlong", "param": null}', "too long", None),
        ('{"error": "model not loaded"}', "model not loaded", None),
        ('{"detail": "Not Found"}', "Not Found", None),
        ('{"detail": [{"loc": ["body", "n"], "msg": "bad"}]}', "bad", "n"),
        ("<h1>Bad\n gateway</h1>", "<h1>Bad gateway</h1>", None),
        ("", "no message", None),
    ],
)
def test_every_form_of_error_is_read(text: str, message: str, param: str | None) -> None:
    fault = read_fault(400, text)
    assert (fault.status, fault.message, fault.param) == (400, message, param)


def test_stream_lines_that_are_not_data_are_skipped() -> None:
    assert [read_event(line) for line in ("", ": ping", "event: x", "id: 3")] == [None] * 4
    assert read_event("data:[DONE]").finished  # type: ignore[union-attr]


def test_content_in_parts_is_their_text() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    choice = {"message": {"role": "assistant", "content": parts}, "finish_reason": "stop", "index": None}
    assert read(choice).text == "ab"
