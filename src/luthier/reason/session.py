"""One problem in work: calls to models by role, what they cost, the budget, and the solutions proposed so far.

A failed call is an error that ends the problem, never an answer. A spent budget ends it with the best answer so far.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.llm.types import GO_ON, Backend, Completion, Message, Request, Usage
from luthier.reason.config import ReasonConfig
from luthier.reason.prompts import PROMPTS, Step
from luthier.reason.replies import read_score
from luthier.reason.trace import Trace
from luthier.reason.votes import Vote, tally
from luthier.tasks.answers import extract_answer, final_text, same_quick

Role = Literal["solve", "decompose", "step", "judge", "refine", "plan"]
ROLES: tuple[Role, ...] = ("solve", "decompose", "step", "judge", "refine", "plan")
Equivalence = Callable[[str, str], Awaitable[bool | None]]
Price = Callable[[str, Usage], float | None]
Stop = Literal["agreed", "rounds", "budget", "context", "done", "no answer"]
Result = TypeVar("Result")


class BudgetSpent(Exception):
    """The next call would go over a budget."""


@dataclass(frozen=True)
class Models:
    """Who answers: one model for everything, or others for some roles. `price(model, usage)` gives dollars."""

    default: Backend
    by_role: Mapping[str, Backend] = field(default_factory=dict)
    price: Price | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.by_role) - set(ROLES):
            raise ConfigError(f"no such role: {', '.join(sorted(unknown))}", hint=f"the roles are {', '.join(ROLES)}")

    def of(self, role: Role) -> Backend:
        """The model that plays a role."""
        return self.by_role.get(role, self.default)


@dataclass(frozen=True)
class CheckedStep:
    """A step and what its re-answers say.

    `confidence` is 0 to 1, None when it could not be read. `agrees`: the re-answers do not outvote the stated answer.
    `majority`: their most common answer, None when there is none with enough votes.
    """

    step: Step
    votes: tuple[tuple[str, int], ...] = ()
    confidence: float | None = None
    agrees: bool = True
    majority: str | None = None
    decided_by: Literal["votes", "checker", "memo", "judge", "trust"] = "votes"

    def to_json(self, index: int) -> dict[str, Any]:
        """As it stands in traces; `index` counts from 0."""
        return {
            "index": index,
            "question": self.step.question,
            "answer": self.step.answer,
            "votes": [{"answer": answer, "count": count} for answer, count in self.votes],
            "confidence": self.confidence,
            "agrees": self.agrees,
            "majority": self.majority,
            "decided_by": self.decided_by,
        }


@dataclass(frozen=True)
class Proposal:
    """A solution that was on the table: its text, its answer (None: none found) and, once checked, its steps."""

    round: int
    text: str
    answer: str | None
    steps: tuple[CheckedStep, ...] = ()

    @property
    def confidence(self) -> float | None:
        """That of the weakest step; None before the check."""
        known = [step.confidence for step in self.steps if step.confidence is not None]
        return min(known) if known else None


@dataclass(frozen=True)
class Solution:
    """The outcome for one problem. Cost is in dollars, None when a price is unknown."""

    answer: str | None
    text: str
    rounds: tuple[Proposal, ...]
    stop: Stop
    usage: Usage
    cost: float | None
    flags: tuple[str, ...]
    """What was replaced by something weaker, in words."""
    seconds: float

    @property
    def steps(self) -> tuple[CheckedStep, ...]:
        """The steps that were checked last."""
        return next((proposal.steps for proposal in reversed(self.rounds) if proposal.steps), ())


class Session:
    """Calls, budget, trace and proposals of one problem."""

    def __init__(
        self,
        question: str,
        models: Models,
        config: ReasonConfig,
        *,
        equivalence: Equivalence,
        trace: Trace,
        seed: int = 0,
        context: Sequence[Message] = (),
    ) -> None:
        if config.max_cost is not None and models.price is None:
            raise ConfigError("max_cost needs the price of the model", hint="add the model to the table of prices")
        self.question = question
        self.config = config
        self.prompts = PROMPTS[config.prompts]
        self.trace = trace
        self.seed = seed
        self.usage = Usage()
        self.cost: float | None = 0.0 if models.price else None
        self.proposals: list[Proposal] = []
        self.flags: list[str] = []
        self.memo: dict[Any, list[str | None]] = {}
        self.stop: Stop = "done"
        self.chosen: int | None = None
        self._models = models
        self._context = tuple(context)
        self._equivalence = equivalence
        self._calls = 0
        self._in_flight = 0
        self._longest = 0
        self._dearest = 0.0
        self._asked: Counter[tuple[str, str]] = Counter()
        self._same: dict[tuple[str, str], bool] = {}

    async def ask(
        self,
        role: Role,
        messages: Sequence[Message],
        *,
        n: int = 1,
        first_sample: int = 0,
        temperature: float | None = None,
        max_tokens: int | None = None,
        json: bool = False,
        logprobs: bool = False,
        alone: bool = False,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """n samples of a reply. `alone`: without the conversation before the question; `first_sample` > 0 continues.

        Messages that end with the assistant's own are gone on with. Raises: BudgetSpent, EndpointError.
        """
        backend = self._models.of(role)
        whole = list(messages) if alone else [*self._context, *messages]
        raw = self.prompts.raw
        request = Request(
            messages=() if raw else whole,
            prompt="".join(message["content"] for message in whole) if raw else None,
            n=n,
            first_sample=first_sample,
            temperature=self.config.temperature if temperature is None else temperature,
            top_p=self.config.top_p,
            max_tokens=self._room(max_tokens or self.config.max_tokens, n),
            seed=self._seed(role, whole, first_sample),
            response_format={"type": "json_object"} if json else None,
            require_format=False,
            logprobs=logprobs,
            stop=stop,
            extra=GO_ON if not raw and whole[-1]["role"] == "assistant" else {},
        )
        self._calls += 1
        with self.trace.span("call", role, **_call_data(role, backend.model, request)) as span:
            self._in_flight += n
            try:
                completions = await backend.complete(request)
            finally:
                self._in_flight -= n
            cost = self._pay(backend.model, completions)
            span.data.update(_reply_data(completions, cost))
        if json and completions[0].format == "text":
            self.flag("the model's JSON mode is not enforced by its server")
        return completions

    async def text(self, role: Role, messages: Sequence[Message], **how: Any) -> str:
        """One reply."""
        return (await self.ask(role, messages, **how))[0].text

    def _seed(self, role: str, messages: Sequence[Message], first_sample: int) -> int:
        """The same question asked again must get a fresh reply, and a repeated run the same one."""
        key = (role, repr(messages))
        if first_sample == 0:
            self._asked[key] += 1
        return derive_seed(self.seed, role, self._asked[key])

    def _room(self, max_tokens: int | None, n: int) -> int | None:
        """Tokens that each of n replies may have. Replies on their way count as the longest, dearest one so far.

        Raises: BudgetSpent.
        """
        limits = self.config
        if limits.max_calls is not None and self._calls >= limits.max_calls:
            raise BudgetSpent(f"{limits.max_calls} calls")
        spent = (self.cost or 0.0) + self._in_flight * self._dearest
        if limits.max_cost is not None and spent >= limits.max_cost:
            raise BudgetSpent(f"{limits.max_cost} dollars")
        if limits.max_tokens_total is None:
            return max_tokens
        left = limits.max_tokens_total - self.usage.completion_tokens - self._in_flight * self._longest
        if left < n:
            raise BudgetSpent(f"{limits.max_tokens_total} tokens")
        return left // n if max_tokens is None else min(left // n, max_tokens)

    def _pay(self, model: str, completions: Sequence[Completion]) -> float | None:
        used = sum((completion.usage for completion in completions), Usage())
        self.usage += used
        self._longest = max(self._longest, *(completion.usage.completion_tokens for completion in completions))
        cost = self._models.price(model, used) if self._models.price else None
        if cost is None and self.config.max_cost is not None:
            raise ConfigError(
                f"the price of {model!r} is unknown, so max_cost cannot be kept", hint="add it to the table of prices"
            )
        self._dearest = max(self._dearest, (cost or 0.0) / max(len(completions), 1))
        self.cost = None if cost is None or self.cost is None else self.cost + cost
        return cost

    async def same(self, a: str, b: str) -> bool:
        """Whether two answers mean the same: exactly, then symbolically, then as the judge sees it."""
        quick = True if a == b else same_quick(a, b)
        if quick is not None:
            return quick
        key = (a, b) if a <= b else (b, a)
        if key not in self._same:
            symbolic = await self._equivalence(a, b)
            self._same[key] = await self._judged_same(a, b) if symbolic is None else symbolic
        return self._same[key]

    async def _judged_same(self, a: str, b: str) -> bool:
        score = await self.match_score(a, [b])
        return score is not None and score >= self.config.perfect_score

    async def match_score(self, answer: str, references: Sequence[str]) -> int | None:
        """A judge's score 0 to 5 of how well an answer matches references; None: undecided or unreadable."""
        messages = self.prompts.confidence(answer, references)
        limit = min(self.config.judge_max_tokens, self.config.max_tokens or self.config.judge_max_tokens)
        reply = await self.text("judge", messages, temperature=0.0, max_tokens=limit, alone=True)
        return read_score(reply, 5)

    async def tally(self, answers: Sequence[str | None]) -> list[Vote]:
        """Answers grouped by meaning, most common first."""
        return await tally(answers, self.same)

    def propose(self, round_: int, reply: str) -> Proposal:
        """Put a solution on the table. What a model thinks to itself (<think>) is not part of it."""
        proposal = Proposal(round_, final_text(reply).strip(), extract_answer(reply))
        self.proposals.append(proposal)
        self.trace.point("proposal", round=round_, text=proposal.text, answer=proposal.answer, confidence=None)
        return proposal

    def checked(self, proposal: Proposal, steps: Iterable[CheckedStep]) -> Proposal:
        """The proposal with its checked steps, in its place on the table."""
        done = replace(proposal, steps=tuple(steps))
        self.proposals[self.proposals.index(proposal)] = done
        self.trace.point("steps", steps=[step.to_json(index) for index, step in enumerate(done.steps)])
        return done

    def fallback(self, what: str, why: str) -> None:
        """Note that something weaker takes the place of what was asked for."""
        self.trace.point("fallback", what=what, why=why)
        self.flag(f"{what}: {why}")

    def flag(self, text: str) -> None:
        """Note something that whoever reads the answer should know; once."""
        if text not in self.flags:
            self.flags.append(text)


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all at once. When one fails or the caller is cancelled, the others are cancelled and waited for.

    When a budget is spent, what is on its way is paid for already: it is waited for, and counted.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BudgetSpent:
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _call_data(role: str, model: str, request: Request) -> dict[str, Any]:
    return {
        "role": role,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": request.n,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "messages": list(request.messages),
    }


def _reply_data(completions: Sequence[Completion], cost: float | None) -> dict[str, Any]:
    return {
        "replies": [completion.text for completion in completions],
        "gen_ai.usage.input_tokens": sum(completion.usage.prompt_tokens for completion in completions),
        "gen_ai.usage.output_tokens": sum(completion.usage.completion_tokens for completion in completions),
        "gen_ai.response.finish_reasons": [completion.finish_reason for completion in completions],
        "cost": cost,
    }
