"""Answers in OpenAI's form, whole and in pieces, as JSON that is plain ASCII: half an emoji cannot break it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from luthier.llm.types import Usage
from luthier.reason.session import Solution
from luthier.serve.protocol import ChatRequest
from luthier.tasks.answers import final_text


def completion(request: ChatRequest, answers: Mapping[int, tuple[str, str]], usage: Usage) -> dict[str, Any]:
    """A whole answer: texts with their finish reasons, by index."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish,
            "logprobs": None,
        }
        for index, (text, finish) in answers.items()
    ]
    return {**_head(request, "chat.completion"), "choices": choices, "usage": usage_of(usage)}


def chunk(request: ChatRequest, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
    usage = {"usage": None} if request.include_usage else {}
    return {**_head(request, "chat.completion.chunk"), "choices": [choice], **usage}


def usage_chunk(request: ChatRequest, usage: Usage) -> dict[str, Any]:
    """The last piece of a stream that was asked for `include_usage`."""
    return {**_head(request, "chat.completion.chunk"), "choices": [], "usage": usage_of(usage)}


def usage_of(usage: Usage) -> dict[str, Any]:
    """All tokens of all calls."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": request.name, "object": kind, "created": request.created, "model": request.model}


def extension(request: ChatRequest, solution: Solution) -> dict[str, Any]:
    """What OpenAI's form has no place for: the field `luthier` of an answer. Cost in dollars, None when unknown."""
    flags = list(solution.flags)
    if solution.usage.unreported:
        flags.append(f"usage is a lower bound: {solution.usage.unreported} calls came back without token counts")
    return {
        "trace": request.name,
        "method": request.method,
        "answer": solution.answer,
        "stop": solution.stop,
        "flags": flags,
        "steps": [step.to_json(index) for index, step in enumerate(solution.steps)],
        "rounds": [{"round": p.round, "answer": p.answer, "confidence": p.confidence} for p in solution.rounds],
        "calls": solution.usage.calls,
        "cost": solution.cost,
        "seconds": round(solution.seconds, 3),
        "seed": request.seed,
    }


def cut_short(happened: Mapping[str, Any]) -> list[str]:
    """Texts that ended at a limit of length, as far as a trace event tells of some."""
    data = happened.get("data", {})
    reasons = data.get("gen_ai.response.finish_reasons", ())
    replies = data.get("replies", ())
    return [final_text(reply).strip() for reply, why in zip(replies, reasons, strict=False) if why == "length"]


def finish_reason(solution: Solution, cut: Collection[str]) -> str:
    """'length' for a text that was cut short, and when a budget ended the work before anything was said. An answer
    whose checks were cut short is whole."""
    return "length" if solution.text in cut or (solution.stop == "budget" and not solution.text) else "stop"


def encoded(value: Mapping[str, Any]) -> bytes:
    """The body of a response."""
    return json.dumps(value).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()
