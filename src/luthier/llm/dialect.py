"""How one OpenAI-compatible server wants to be asked: requests to JSON bodies, and what its refusals teach.

No probe is sent. A body is first written in the most common dialect; when the server refuses a parameter by name, the
parameter goes into `Dialect.refused` and the body is written again without it. Only what cannot change the answer is
left out on our own authority (a parameter at its neutral value, `stream_options`); leaving out anything else needs the
caller's consent (`ignore`, or `Request.require_format=False`) and is an error without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.llm.types import Format, Request, RequestFailed

# Sampling parameters and the value at which sending them or not is the same thing.
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": ()}
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")  # in order of preference
OPTIONAL = (*NEUTRAL, *TOKEN_LIMITS, "response_format", "n", "stream_options", "echo")
NO_TOKENS = "max_tokens=0"  # refused by servers that must always write at least one token
AMBIGUOUS = ("n", "seed", "stop")  # words of ordinary English: these must be quoted to count as named

_REFUSAL = re.compile(
    r"unsupported|not supported|support(?:s|ed)? only|does(?: not|n't) support|unrecogni[sz]ed|unknown|unexpected|"
    r"not permitted|not allowed|is not available|only one completion choice",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A server's error, whatever form it came in."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Dialect:
    """What one server has accepted and refused so far."""

    def __init__(self, model: str, *, ignore: Iterable[str] = ()) -> None:
        self.model = model
        self.ignore = frozenset(ignore)
        self.refused: set[str] = set()
        if unknown := self.ignore - set(NEUTRAL):
            raise ConfigError(
                f"ignore_unsupported has {sorted(unknown)}, expected some of {list(NEUTRAL)}", hint="remove the others"
            )

    @property
    def native_n(self) -> bool:
        """Whether several samples may be asked for in one call (assumed until the server proves otherwise)."""
        return "n" not in self.refused

    def body(self, request: Request, *, first: int, n: int, stream: bool = False) -> dict[str, Any]:
        """The JSON body that asks for samples first .. first + n - 1."""
        body: dict[str, Any] = {"model": self.model, **request.extra}
        if request.prompt is None:
            body["messages"] = list(request.messages)
        else:
            body["prompt"] = request.prompt
        body |= self._sampling(request, first)
        if n > 1:
            body["n"] = n
        if request.max_tokens is not None:
            body[self._token_limit()] = request.max_tokens
        if request.logprobs:
            body |= _logprobs(request)
        if (response_format := self._response_format(request)) is not None:
            body["response_format"] = response_format
        if stream:
            body["stream"] = True
            if "stream_options" not in self.refused:
                body["stream_options"] = {"include_usage": True}
        return body

    def score_body(self, prompt: str, completion: str) -> dict[str, Any]:
        """The JSON body that asks for the log-probabilities of a given text: an echo without a continuation."""
        if "echo" in self.refused:
            raise RequestFailed(
                f"{self.model} cannot score a given text: the server refuses 'echo'",
                hint="serve the model with vLLM or SGLang, or load it in this process",
                status=400,
            )
        max_tokens = 1 if NO_TOKENS in self.refused else 0
        text = {"prompt": prompt + completion, "echo": True, "logprobs": 1}
        return {"model": self.model, **text, "max_tokens": max_tokens, "temperature": 0.0}

    def format(self, request: Request) -> Format:
        """What this server will enforce of the request's `response_format`."""
        chosen = self._response_format(request)
        return "text" if chosen is None else chosen["type"]

    def learn(self, body: dict[str, Any], fault: Fault) -> bool:
        """Take note of a refused parameter; False when the fault is about something else."""
        if fault.status in (400, 422) and body.get("max_tokens") == 0 and _names(fault, "max_tokens"):
            self.refused.add(NO_TOKENS)
            return True
        # llama.cpp answers 500 to parameters that it does not know.
        if fault.status not in (400, 422, 500, 501) or not _REFUSAL.search(fault.message):
            return False
        for name in OPTIONAL:
            if name in body and _names(fault, name):
                refused = body["response_format"]["type"] if name == "response_format" else name
                self.refused.add(refused)
                return True
        return False

    def _sampling(self, request: Request, first: int) -> dict[str, Any]:
        """Temperature and top_p always (servers differ in their defaults), the rest when set."""
        chosen: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p}
        chosen |= {"top_k": request.top_k} if request.top_k else {}
        chosen |= {"stop": list(request.stop)} if request.stop else {}
        chosen |= {} if request.seed is None else {"seed": sample_seed(request.seed, first)}
        return {name: value for name, value in chosen.items() if not self._leave_out(request, name)}

    def _leave_out(self, request: Request, name: str) -> bool:
        if name not in self.refused:
            return False
        value = getattr(request, name)
        if value != NEUTRAL[name] and name not in self.ignore:
            raise RequestFailed(
                f"{self.model} does not take {name}={value!r}: the server refuses the parameter",
                hint=f"ask with {name}={NEUTRAL[name]!r}, or allow it to be left out: ignore_unsupported=({name!r},)",
                status=400,
            )
        return True

    def _token_limit(self) -> str:
        for name in TOKEN_LIMITS:
            if name not in self.refused:
                return name
        raise RequestFailed(
            f"{self.model} takes neither of {' and '.join(TOKEN_LIMITS)}", hint="ask with max_tokens=None", status=400
        )

    def _response_format(self, request: Request) -> dict[str, Any] | None:
        wanted = request.response_format
        if wanted is None or wanted["type"] not in self.refused:
            return None if wanted is None else dict(wanted)
        if request.require_format:
            raise RequestFailed(
                f"{self.model} cannot enforce response_format {wanted['type']!r}: the server refuses it",
                hint="Request(require_format=False) accepts a weaker format and reports it in Completion.format",
                status=400,
            )
        return None if "json_object" in self.refused else {"type": "json_object"}


def sample_seed(seed: int, index: int) -> int:
    """The seed of one sample: sample 0 has the caller's own; 31 bits, since servers differ in what they take."""
    return seed if index == 0 else derive_seed(seed, "sample", index) & 0x7FFFFFFF


def _logprobs(request: Request) -> dict[str, Any]:
    if request.prompt is not None:
        return {"logprobs": max(1, request.top_logprobs)}  # here the parameter is a count, and 0 turns it off
    return {"logprobs": True} | ({"top_logprobs": request.top_logprobs} if request.top_logprobs else {})


def _names(fault: Fault, name: str) -> bool:
    """Whether the server's message is about this parameter."""
    if fault.param is not None:
        return fault.param.split(".")[0] == name
    if name == "n" and "only one completion choice" in fault.message.lower():
        return True
    if name == "response_format" and re.search(r"json_schema|json_object|structured output", fault.message, re.I):
        return True
    quote = r"[`'\"]" if name in AMBIGUOUS else ""
    return re.search(rf"(?<!\w){quote}{name}{quote}(?!\w)", fault.message) is not None
