"""What is said to a language model and what comes back: plain frozen values, torch-free, JSON both ways.

Log-probabilities are natural logarithms (nats); lengths are tokens of the model that answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from luthier.core.errors import ConfigError, EndpointError

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]
Format = Literal["text", "json_object", "json_schema"]
FORMATS: tuple[Format, ...] = ("text", "json_object", "json_schema")

# First part of every request key: raise it when the meaning of a request changes, so that old replies are not reused.
KEY_VERSION = "luthier-request-1"


# `Request.extra` that asks for the rest of an unfinished last message: vLLM's and SGLang's words for it.
GO_ON = {"continue_final_message": True, "add_generation_prompt": False}

# One turn of a conversation, {"role": ..., "content": ...}: the row format of TRL and of every chat API.
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question to a model: chat `messages` or a raw `prompt`, and how to sample.

    A request with the same `seed` gives the same samples wherever the backend can promise it (`LocalModel` does,
    servers try to). Sample k of a request is the same whether it is asked for alone or with others.
    """

    messages: Sequence[Message] = ()
    """Chat turns, oldest first; empty when `prompt` is given."""
    prompt: str | None = None
    """Text to continue as it is, without a chat template: what base models expect."""
    n: int = 1
    """Number of samples."""
    first_sample: int = 0
    """Index of the first of the n samples: (n=2, first_sample=3) asks for samples 3 and 4."""
    max_tokens: int | None = None
    """Longest answer in tokens; None leaves it to the backend (a local model: what the context has room for)."""
    temperature: float = 1.0
    """0 is greedy. Always sent, since servers differ in their default."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is off. Not part of OpenAI's protocol, so sent only when on."""
    stop: Sequence[str] = ()
    """The answer ends before the first of these."""
    seed: int | None = None
    """None: fresh randomness."""
    logprobs: bool = False
    """Return each token's log-probability."""
    top_logprobs: int = 0
    """Also return this many most likely alternatives for each token."""
    response_format: Mapping[str, Any] | None = None
    """OpenAI's `response_format`: {"type": "json_object"}, or what `json_schema` makes."""
    require_format: bool = True
    """False: a backend that cannot enforce `response_format` may answer with a weaker one; `Completion.format` says
    which. True: it raises EndpointError instead."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Sent to the server as it is (`reasoning_effort`, `chat_template_kwargs`, ...)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check_input(self)
        _check_numbers(self)
        normal = {
            "messages": tuple(dict(message) for message in self.messages),
            "temperature": float(self.temperature),  # 0 and 0.0 are one request: they must have one key
            "top_p": float(self.top_p),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def canonical(self) -> dict[str, Any]:
        """Everything that can change one sample: the request without the number of samples."""
        return {name: value for name, value in vars(self).items() if name not in ("n", "first_sample")}


def _check_input(request: Request) -> None:
    if bool(request.messages) == (request.prompt is not None):
        raise ConfigError(
            "a request needs either messages or a prompt, got " + ("both" if request.messages else "neither"),
            hint="Request(messages=[{'role': 'user', 'content': ...}]) or Request(prompt=...)",
        )
    for number, message in enumerate(request.messages):
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ConfigError(
                f"message {number} is {message!r}, expected a dict with the strings 'role' and 'content'",
                hint="for example {'role': 'user', 'content': 'Hello'}",
            )
    if request.response_format is not None and request.response_format.get("type") not in FORMATS:
        raise ConfigError(
            f"response_format is {dict(request.response_format)!r}, expected a 'type' out of {FORMATS}",
            hint="{'type': 'json_object'} or luthier.llm.json_schema(name, schema)",
        )
    if not all(request.stop):
        raise ConfigError("an empty stop string would end every answer at once", hint="remove it")


def _check_numbers(request: Request) -> None:
    limits: tuple[tuple[str, bool, str], ...] = (
        ("n", request.n >= 1, "at least 1"),
        ("first_sample", request.first_sample >= 0, "at least 0"),
        ("max_tokens", request.max_tokens is None or request.max_tokens >= 1, "at least 1, or None"),
        ("temperature", request.temperature >= 0, "at least 0"),
        ("top_p", 0 < request.top_p <= 1, "in (0, 1]"),
        ("top_k", request.top_k >= 0, "at least 0"),
        ("top_logprobs", request.top_logprobs == 0 or (request.logprobs and request.top_logprobs > 0), "0 or logprobs"),
    )
    for name, valid, expected in limits:
        if not valid:
            raise ConfigError(f"{name} is {getattr(request, name)!r}, expected {expected}", hint=f"change {name}")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What was paid for. `+` adds; over the completions of one call the parts add up to what the server reported."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """The hidden part of completion_tokens."""
    calls: int = 0
    """Requests sent (a local model: prompts read)."""
    unreported: int = 0
    """Calls whose server told no token counts: with these the token totals are lower bounds."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            calls=self.calls + other.calls,
            unreported=self.unreported + other.unreported,
        )


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token and its log-probability in nats."""

    token: str
    logprob: float
    token_id: int | None = None
    """Known to local models only."""
    bytes: tuple[int, ...] | None = None
    """The token's bytes where the server gives them: a token need not be whole characters."""
    top: tuple[tuple[str, float], ...] = ()
    """The most likely alternatives, best first."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample."""

    text: str
    finish_reason: FinishReason
    index: int = 0
    """Sample index in the request, counted from 0 whatever `first_sample` was."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """None when not asked for. The end-of-text token is not listed."""
    usage: Usage = Usage()
    reasoning: str = ""
    """Hidden reasoning, where the server separates it (`reasoning_content`)."""
    format: Format = "text"
    """What the backend enforced of `response_format`."""

    def to_json(self) -> dict[str, Any]:
        tokens = None if self.logprobs is None else [asdict(token) for token in self.logprobs]
        return {**vars(self), "logprobs": tokens, "usage": dict(vars(self.usage))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Completion:
        tokens = value["logprobs"]
        logprobs = None if tokens is None else tuple(_token_from_json(token) for token in tokens)
        return cls(**{**value, "logprobs": logprobs, "usage": Usage(**value["usage"])})


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a model finds a given text after a given prompt."""

    tokens: tuple[TokenLogprob, ...]
    """The tokens of the text, in order."""
    usage: Usage = Usage()
    greedy: bool | None = None
    """Whether each token is the most likely one at its place; None where the backend does not tell."""

    @property
    def logprob(self) -> float:
        """Log-probability of the whole text, in nats."""
        return sum(token.logprob for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Score:
        tokens = tuple(_token_from_json(token) for token in value["tokens"])
        return cls(tokens=tokens, usage=Usage(**value["usage"]), greedy=value.get("greedy"))


def _token_from_json(value: Mapping[str, Any]) -> TokenLogprob:
    code = None if value["bytes"] is None else tuple(value["bytes"])
    return TokenLogprob(**{**value, "bytes": code, "top": tuple((token, logprob) for token, logprob in value["top"])})


class ContextExceeded(ConfigError):
    """Prompt and answer do not fit the model's context."""


class RequestFailed(EndpointError):
    """A call to a model failed for good. It never stands for an empty answer.

    `status` is the server's HTTP status, None when there was no answer. `retry_after`: seconds that it asked to wait.
    `timed_out`: it did not answer in time. `completions` holds the samples of the same request that did succeed (they
    are paid for: `CachedBackend` keeps them).
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str,
        status: int | None = None,
        retry_after: float | None = None,
        timed_out: bool = False,
        completions: Sequence[Completion] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after = retry_after
        self.timed_out = timed_out or status in (408, 504)
        self.completions = tuple(completions)


class Backend(Protocol):
    """Anything that answers requests. Use one backend object inside one event loop."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    @property
    def usage(self) -> Usage:
        """Everything paid so far."""
        ...

    async def complete(self, request: Request) -> list[Completion]:
        """The request's n samples, in order; EndpointError when any of them failed."""
        ...

    async def score(self, prompt: str, completion: str) -> Score:
        """Log-probability of `completion` after `prompt` (both raw text); EndpointError where unsupported."""
        ...

    async def aclose(self) -> None:
        """Release connections, threads and files."""
        ...


class StreamingBackend(Backend, Protocol):
    """A backend that can also show an answer while it is being written."""

    def stream(self, request: Request) -> AsyncIterator[str]:
        """The single sample of the request in pieces; their concatenation is the completion's text."""
        ...


def json_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A `response_format` that asks for JSON valid under `schema` (strict: list every property as required)."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": dict(schema), "strict": True}}


def request_key(model: str, request: Request, sample_index: int) -> str:
    """SHA-256 (hexadecimal) that names one sample: model, everything that shapes the sample, and its index."""
    return request_keys(model, request, [sample_index])[sample_index]


def request_keys(model: str, request: Request, sample_indices: Iterable[int]) -> dict[int, str]:
    """`request_key` of several samples, by index."""
    begun = hashlib.sha256(_canonical([KEY_VERSION, "complete", model, request.canonical()])[:-1])
    keys = {}
    for index in sample_indices:
        whole = begun.copy()
        whole.update(f",{index}]".encode())
        keys[index] = whole.hexdigest()
    return keys


def score_key(model: str, prompt: str, completion: str) -> str:
    """SHA-256 (hexadecimal) that names one score."""
    return hashlib.sha256(_canonical([KEY_VERSION, "score", model, prompt, completion])).hexdigest()


def _canonical(parts: list[Any]) -> bytes:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")
