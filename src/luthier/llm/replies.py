"""What OpenAI-compatible servers answer: JSON payloads, event streams and errors to our types. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.llm.dialect import Fault
from luthier.llm.types import Completion, FinishReason, Format, RequestFailed, Score, TokenLogprob, Usage

# Servers' words for how an answer ended -> ours. null comes from servers that only ever stop by themselves.
FINISH_REASONS: dict[str | None, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    None: "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


def read_fault(status: int, text: str) -> Fault:
    """The error in a server's answer: OpenAI's, vLLM's and FastAPI's forms, or the plain text."""
    try:
        payload = json.loads(text)
    except ValueError:
        return Fault(status=status, message=" ".join(text.split())[:300] or "no message")
    return fault_in(status, payload) or Fault(status=status, message=json.dumps(payload)[:300])


def fault_in(status: int, payload: Any) -> Fault | None:
    """The error that a parsed payload carries, if any. Some gateways send one with status 200."""
    if not isinstance(payload, dict) or payload.get("choices"):
        return None
    if isinstance(detail := payload.get("detail"), list) and detail and isinstance(detail[0], dict):
        location = detail[0].get("loc") or [None]
        return Fault(status=status, message=str(detail[0].get("msg")), param=str(location[-1]))
    error = payload.get("error", payload if payload.get("object") == "error" else payload.get("detail"))
    if error is None:
        return None
    if not isinstance(error, dict):
        return Fault(status=status if status >= 400 else 502, message=str(error))
    code = error.get("code")
    if status < 400:
        status = code if isinstance(code, int) and code >= 400 else 502
    param = error.get("param")
    return Fault(
        status=status,
        message=" ".join(str(error.get("message", error)).split()),
        param=param if isinstance(param, str) else None,
        code=None if code is None else str(code),
    )


def read_completions(
    payload: Mapping[str, Any], *, first: int, n: int, top: int | None, enforced: Format
) -> list[Completion]:
    """The choices of one call as samples first, first + 1, ... (at most n; a server may give fewer).

    `top`: None when log-probabilities were not asked for, else the number of alternatives wanted.
    The call's token counts are split over the choices so that they add up exactly.
    """
    choices = sorted(payload.get("choices") or [], key=lambda choice: choice.get("index") or 0)[:n]
    if not choices:
        raise RequestFailed("the server answered without any choice", hint="is this an OpenAI-compatible server?")
    usages = split_usage(read_usage(payload.get("usage")), len(choices))
    return [
        _completion(choice, first + position, usage, top=top, enforced=enforced)
        for position, (choice, usage) in enumerate(zip(choices, usages, strict=True))
    ]


def _completion(
    choice: Mapping[str, Any], index: int, usage: Usage, *, top: int | None, enforced: Format
) -> Completion:
    message = choice.get("message") or {}
    reason = FINISH_REASONS.get(choice.get("finish_reason"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    text = choice["text"] if "text" in choice else _plain(message.get("content"))
    if message.get("refusal"):
        text, reason = message["refusal"], "content_filter"
    if reason is None:
        raise RequestFailed(
            f"the server ended an answer with the reason {choice.get('finish_reason')!r}",
            hint=f"expected one of {[name for name in FINISH_REASONS if name]}",
        )
    if text is None and reason == "stop" and not reasoning:
        raise RequestFailed("the server sent an answer without content", hint="look at the server's log")
    return Completion(
        text=text or "",
        finish_reason=reason,
        index=index,
        logprobs=None if top is None else read_logprobs(choice.get("logprobs"), top),
        usage=usage,
        reasoning=reasoning,
        format=enforced,
    )


def _plain(content: Any) -> str | None:
    """A message's content as text; some servers send it in typed parts."""
    if not isinstance(content, list):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def read_usage(value: Mapping[str, Any] | None) -> Usage:
    """Token counts of one call; counted in `unreported` where the server gives none."""
    if not value or value.get("prompt_tokens") is None:
        return Usage(calls=1, unreported=1)
    details = value.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=value["prompt_tokens"],
        completion_tokens=value.get("completion_tokens") or 0,
        reasoning_tokens=details.get("reasoning_tokens") or 0,
        calls=1,
    )


def split_usage(usage: Usage, parts: int) -> list[Usage]:
    """Usage of a call over its samples: the prompt and the call on the first, the answers' tokens evenly."""
    shares = []
    for part in range(parts):
        first = part == 0
        shares.append(
            Usage(
                prompt_tokens=usage.prompt_tokens if first else 0,
                completion_tokens=_share(usage.completion_tokens, parts, part),
                reasoning_tokens=_share(usage.reasoning_tokens, parts, part),
                calls=usage.calls if first else 0,
                unreported=usage.unreported if first else 0,
            )
        )
    return shares


def _share(total: int, parts: int, part: int) -> int:
    return total // parts + (part < total % parts)


def read_logprobs(value: Mapping[str, Any] | None, top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of an answer, in the chat form (`content`) or the legacy completion form (`tokens`)."""
    if value and value.get("content") is not None:
        return tuple(_chat_token(token, top) for token in value["content"])
    if value and value.get("tokens") is not None:
        alternatives = value.get("top_logprobs") or [None] * len(value["tokens"])
        columns = zip(value["tokens"], value["token_logprobs"], alternatives, strict=True)
        return tuple(
            TokenLogprob(token=token, logprob=logprob, top=_best((others or {}).items(), top))
            for token, logprob, others in columns
        )
    raise RequestFailed(
        "the server sent no log-probabilities although they were asked for",
        hint="use a server and model that give them (vLLM, SGLang, llama.cpp), or ask with logprobs=False",
    )


def _chat_token(token: Mapping[str, Any], top: int) -> TokenLogprob:
    code = token.get("bytes")
    others = [(other["token"], other["logprob"]) for other in token.get("top_logprobs") or []]
    return TokenLogprob(
        token=token["token"],
        logprob=token["logprob"],
        bytes=None if code is None else tuple(code),
        top=_best(others, top),
    )


def _best(pairs: Any, top: int) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:top])


def read_score(payload: Mapping[str, Any], completion: str, *, max_tokens: int) -> Score:
    """The scored text's tokens in an `echo` reply, found from its end.

    Text offsets are not used: servers count special tokens such as the BOS differently. A token that spans the border
    between prompt and text belongs to the text.
    """
    (choice,) = payload["choices"]
    tokens = list(read_logprobs(choice.get("logprobs"), 1))
    if max_tokens:
        del tokens[len(tokens) - (payload.get("usage") or {}).get("completion_tokens", max_tokens) :]
    start, covered = len(tokens), ""
    while len(covered) < len(completion) and start > 0:
        start -= 1
        covered = tokens[start].token + covered
    scored: Sequence[TokenLogprob] = tokens[start:]
    if not covered.endswith(completion) or any(token.logprob is None for token in scored):
        raise RequestFailed(
            f"cannot find the scored text {completion[:40]!r} among the tokens that the server echoed",
            hint="the server must echo the prompt with log-probabilities, and the prompt must not be empty",
        )
    told = all(token.top for token in scored)
    greedy = all(token.top[0][0] == token.token for token in scored) if told else None
    return Score(tokens=tuple(scored), usage=read_usage(payload.get("usage")), greedy=greedy)


@dataclass(frozen=True)
class Event:
    """One event of a streamed answer."""

    text: str = ""
    finished: bool = False
    usage: Usage | None = None


def read_event(line: str) -> Event | None:
    """One line of a server-sent event stream; None for comments, blank lines and other fields."""
    if not line.startswith("data:"):
        return None
    data = line[len("data:") :].strip()
    if data == "[DONE]":
        return Event(finished=True)
    try:
        payload = json.loads(data)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        raise RequestFailed(f"the server streamed {data[:60]!r}, not a JSON object", hint="look at the server's log")
    if (fault := fault_in(200, payload)) is not None:
        raise RequestFailed(f"the server broke off the answer: {fault.message}", hint="try again", status=fault.status)
    usage = read_usage(payload["usage"]) if payload.get("usage") else None
    for choice in payload.get("choices") or []:
        text = choice["text"] if "text" in choice else _plain((choice.get("delta") or {}).get("content"))
        return Event(text=text or "", finished=choice.get("finish_reason") is not None, usage=usage)
    return Event(usage=usage)
