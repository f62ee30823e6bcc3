"""Chat completion requests as OpenAI writes them.

A parameter that a reasoner cannot honor is refused by name: what was asked for is never left out unseen.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.core.errors import ConfigError, did_you_mean
from luthier.llm.types import Message
from luthier.reason.config import ReasonConfig
from luthier.reason.methods import METHODS, parse_method
from luthier.serve.failures import ApiError

# What we act on, and what changes no answer.
READ = {"model", "messages", "stream", "stream_options", "temperature", "max_tokens", "max_completion_tokens", "seed"}
TELLS_NOTHING = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "num_retries"}
# Values of other parameters that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "top_p": (1,),
    "top_k": (0, -1),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
ROLES = ("system", "developer", "user", "assistant")
LIMITS = ("max_calls", "max_tokens_total", "max_seconds", "max_cost")


@dataclass(frozen=True)
class ChatRequest:
    """A request as far as we act on it. `content` is all of it, as it came; `body` the same parsed."""

    model: str
    content: bytes
    body: Mapping[str, Any]
    stream: bool
    include_usage: bool
    method: str | None
    """As in 'ssr-plan:rounds=5'; None: the plain model is asked for."""
    upstream_model: str
    name: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex[:24]}")
    """Of the answer and of its trace."""
    created: int = field(default_factory=lambda: int(time.time()))
    fresh_seed: int = field(default_factory=lambda: secrets.randbits(31))

    @property
    def wants_tools(self) -> bool:
        """Whether tools are offered to the model, or their results are part of the conversation."""
        messages = self.body.get("messages")
        turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
        used = any(turn.get("role") in ("tool", "function") or turn.get("tool_calls") for turn in turns)
        return used or bool(self.body.get("tools") or self.body.get("functions"))

    @property
    def seed(self) -> int:
        """The seed asked for, or a fresh one. Raises: ApiError 400."""
        seed = integer(self.body, "seed")
        return self.fresh_seed if seed is None else seed


def read_request(content: bytes) -> ChatRequest:
    """A chat completion request. Raises: ApiError 400 with what is wrong."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not valid JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body["model"]:
        raise ApiError(400, "the request names no model", param="model")
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        name = "stream_options" if isinstance(stream, bool) else "stream"
        raise ApiError(400, f"{name}: got {body[name]!r}", param=name)
    method, model = split_model(body["model"])
    return ChatRequest(body["model"], content, body, stream, bool(options.get("include_usage")), method, model)


def split_model(name: str) -> tuple[str | None, str]:
    """'ssr-plan:rounds=5/org/model' as the method and the plain name; a name without a method stays whole."""
    head, _, rest = name.partition("/")
    return (head, rest) if rest and method_name(head) in METHODS else (None, name)


def method_name(head: str) -> str:
    """The method in 'maj@16' or 'ssr:rounds=5'."""
    return re.split("[@:]", head, maxsplit=1)[0]


def looks_like_method(name: str) -> str:
    """For a model's name that begins almost like a method: what it may stand for, in words. '' for others."""
    head, _, rest = name.partition("/")
    if method_name(head) in METHODS and not rest:
        return f" (write {head}/MODEL)"
    methods = f" (the methods: {', '.join(METHODS)})" if re.search("@|:.*=", head) else ""
    return did_you_mean(method_name(head), METHODS) or methods


def conversation(body: Mapping[str, Any], *, reasoner: bool = True) -> list[Message]:
    """The messages as text; a reasoner's last one is the user's. Raises: ApiError 400 for images, tool results, …"""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "the request has no messages", param="messages")
    turns = [_message(message, number) for number, message in enumerate(messages)]
    if reasoner and turns[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's: it is the question", param="messages")
    return turns


def _message(message: Any, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(400, f"{where}: only {', '.join(ROLES)} messages can be answered", param=where)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}: only text can be answered", param=where)
    if re.search("[\ud800-\udfff]", content):
        raise ApiError(400, f"{where}: half a surrogate pair is no text", param=where)
    name = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
    return {"role": message["role"], "content": content, **name}  # not `reasoning_content`: it was the model's own


def settings(request: ChatRequest, limits: Mapping[str, float | None]) -> ReasonConfig:
    """The method with the request's temperature and length, and the server's limits where they are tighter.

    Raises: ApiError 404 for a method with bad settings, 400 for parameters that it cannot honor.
    """
    assert request.method is not None
    refuse_others(request, READ, f"{request.model} cannot do this; leave it out, or ask {request.upstream_model}")
    try:
        config = parse_method(request.method)
    except ConfigError as error:
        raise ApiError(404, f"{error} ({error.hint})", param="model", code="model_not_found") from error
    changes: dict[str, Any] = {"temperature": number(request.body, "temperature"), "max_tokens": length(request.body)}
    for name in LIMITS:
        known = [value for value in (getattr(config, name), limits.get(name)) if value is not None]
        changes[name] = min(known) if known else None
    try:
        return replace(config, **{name: value for name, value in changes.items() if value is not None})
    except ConfigError as error:
        raise ApiError(400, f"{error} ({error.hint})") from error


def refuse_others(request: ChatRequest, known: Collection[str], why: str) -> None:
    """ApiError 400 for the first parameter that is not in `known` and asks for something."""
    for name, value in request.body.items():
        if value is None or name in known or name in TELLS_NOTHING or value in NEUTRAL.get(name, ()):
            continue
        raise ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")


def length(body: Mapping[str, Any]) -> int | None:
    """The longest answer asked for, in tokens, under either of its names. Raises: ApiError 400."""
    longest = integer(body, "max_completion_tokens")
    return integer(body, "max_tokens") if longest is None else longest


def number(body: Mapping[str, Any], name: str) -> float | None:
    """A number, or None where there is none. Raises: ApiError 400 for anything else."""
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
        raise ApiError(400, f"{name}: got {value!r}, expected a number", param=name)
    return value


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def integer(body: Mapping[str, Any], name: str) -> int | None:
    """A whole number, or None where there is none. Raises: ApiError 400 for anything else."""
    value = number(body, name)
    if value is not None and not isinstance(value, int):
        raise ApiError(400, f"{name}: got {value!r}, expected a whole number", param=name)
    return value


def strings(body: Mapping[str, Any], name: str) -> list[str]:
    """A string or a list of them as a list, empty where there is none. Raises: ApiError 400 for anything else."""
    value = body.get(name) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(400, f"{name}: got {value!r}, expected strings", param=name)
    return texts
