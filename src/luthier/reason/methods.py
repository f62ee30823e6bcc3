"""All methods by name, and `solve`: a question in, an answer with its record out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from luthier.core.config import build, override, to_mapping
from luthier.core.errors import ConfigError, did_you_mean
from luthier.llm.types import ContextExceeded, Message
from luthier.reason.atom import atom
from luthier.reason.config import ReasonConfig
from luthier.reason.critique import debate, self_refine
from luthier.reason.mctsr import mctsr
from luthier.reason.sampling import best_of_n, cot, maj
from luthier.reason.session import BudgetSpent, Equivalence, Models, Proposal, Session, Solution
from luthier.reason.ssr import ssr_ada, ssr_lin, ssr_plan
from luthier.reason.trace import Trace

METHODS: dict[str, Callable[[Session], Awaitable[None]]] = {
    "ssr": ssr_lin,
    "ssr-lin": ssr_lin,
    "ssr-ada": ssr_ada,
    "ssr-plan": ssr_plan,
    "cot": cot,
    "maj": maj,
    "best-of-n": best_of_n,
    "self-refine": self_refine,
    "debate": debate,
    "atom": atom,
    "mctsr": mctsr,
}
_TEXT = re.compile(r"(?P<name>[a-z-]+)(?:@(?P<votes>\d+))?(?::(?P<settings>.+))?", re.DOTALL)


def parse_method(text: str) -> ReasonConfig:
    """Settings from 'ssr-plan:rounds=5,samples=3', 'ssr-lin:preset=paper' or 'maj@16' (votes=16).

    Raises: ConfigError for unknown methods, settings and values.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None or match["name"] not in METHODS:
        name = match["name"] if match else text
        raise ConfigError(
            f"{text!r}: no such method{did_you_mean(name, METHODS)}", hint=f"the methods are {', '.join(METHODS)}"
        )
    values: dict[str, Any] = {"method": match["name"]}
    if match["votes"]:
        values["votes"] = int(match["votes"])
    # A comma inside brackets belongs to a list.
    for assignment in re.split(r",(?![^\[]*\])", match["settings"] or ""):
        if assignment.strip():
            override(values, assignment.strip())
    return build(ReasonConfig, values, where=f"{match['name']}:")


async def solve(
    question: str | Sequence[Message],
    models: Models,
    config: ReasonConfig,
    *,
    equivalence: Equivalence,
    trace: Trace | None = None,
    seed: int = 0,
) -> Solution:
    """Answer a question, or the last user turn of a conversation, with the method that `config` names.

    `equivalence(a, b)`: whether two answers mean the same, None when it cannot tell (`Grader.equivalent`). Equal seeds
    give equal requests. A spent budget gives the answer so far. Raises: EndpointError when a model fails.
    """
    context, asked = _split(question)
    trace = trace or Trace()
    session = Session(asked, models, config, equivalence=equivalence, trace=trace, seed=seed, context=context)
    about = {"question": asked, "method": config.method, "model": models.default.model, "config": to_mapping(config)}
    with trace.span("problem", config.method, **about) as span:
        try:
            async with asyncio.timeout(config.max_seconds) as clock:
                await METHODS[config.method](session)
        except (BudgetSpent, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not clock.expired():
                raise
            session.stop = "budget"
            trace.point("budget", spent=str(error) or f"{config.max_seconds} seconds")
        except ContextExceeded as error:
            if not session.proposals:
                raise
            session.stop = "context"  # a doubted solution is longer than a plain one: what there is counts
            session.flag(f"a later call did not fit the model's context: {error}")
        solution = await _conclude(session)
        span.data.update(_summary(solution))
    return solution


def _split(question: str | Sequence[Message]) -> tuple[Sequence[Message], str]:
    if isinstance(question, str):
        return (), question
    if not question or question[-1].get("role") != "user":
        raise ConfigError(
            "the conversation does not end with a user's message", hint="the last message must be the question"
        )
    return tuple(question[:-1]), question[-1]["content"]


async def _conclude(session: Session) -> Solution:
    chosen = await _choose(session)
    answer = None if session.stop == "no answer" or chosen is None else chosen.answer
    return Solution(
        answer=answer,
        text=chosen.text if chosen else "",
        rounds=tuple(session.proposals),
        stop="no answer" if answer is None and session.stop != "budget" else session.stop,
        usage=session.usage,
        cost=session.cost,
        flags=tuple(session.flags),
        seconds=session.trace.seconds,
    )


async def _choose(session: Session) -> Proposal | None:
    """The proposal that counts: a method's own choice, or what `final` says."""
    proposals = session.proposals
    if not proposals:
        return None
    if session.chosen is not None:
        return proposals[session.chosen]
    answered = [proposal for proposal in proposals if proposal.answer is not None]
    if session.config.reference_compat or not answered:
        return proposals[-1]
    if session.config.final == "last" or session.stop == "agreed":
        return answered[-1]
    try:
        votes = await session.tally([proposal.answer for proposal in answered])
    except BudgetSpent:
        return answered[-1]
    rounds_of = {index: vote.count for vote in votes for index in vote.members}
    if session.config.final == "vote":
        return answered[max(range(len(answered)), key=lambda index: (rounds_of[index], index))]
    return answered[max(range(len(answered)), key=lambda i: (rounds_of[i], *_confidence(answered[i]), i))]


def _confidence(proposal: Proposal) -> tuple[float, float]:
    known = [step.confidence for step in proposal.steps if step.confidence is not None]
    return (min(known), sum(known) / len(known)) if known else (-1.0, -1.0)


def _summary(solution: Solution) -> dict[str, Any]:
    usage = solution.usage
    return {
        "answer": solution.answer,
        "text": solution.text,
        "stop": solution.stop,
        "flags": list(solution.flags),
        "rounds": len({proposal.round for proposal in solution.rounds}) - 1,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "calls": usage.calls,
            "unreported": usage.unreported,
        },
        "cost": solution.cost,
        "seconds": solution.seconds,
    }
