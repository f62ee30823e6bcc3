"""Steps without questions: each line of a solution is one.

A line is re-answered by going on from the lines before it, and the first line that is outvoted gives way to the
majority, from which the solution goes on. What the solution itself says is one of the M answers, and so is what other
first chains say after the same lines. Nothing is asked that the model does not do when it solves: no decomposition
that can be misread, no hint that can be ignored. It needs a model that goes on with a reply that was begun for it: one
in this process, or a server with `continue_final_message` (vLLM, SGLang, llama.cpp). One that does not is noticed, and
flagged.

Meant for solutions of one inference a line. Two lines agree when they are the same, or give the same value (what stands
after the last `=`) for the same left-hand side; lines without `=` are compared as answers are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate

from luthier.llm.types import Completion
from luthier.reason.prompts import Step
from luthier.reason.session import CheckedStep, Proposal, Session, together
from luthier.reason.steps import outvoted, sample_answers, weigh
from luthier.tasks.answers import final_text

_LINE = re.compile(r"[^\n]*\S[^\n]*(?:\n(?:[^\S\n]*\n)*)?")


def pieces_of(text: str) -> list[str]:
    """A solution cut before each line; the pieces, joined, are the text again. Empty lines belong to the one before."""
    return _LINE.findall(text.strip())


def note_lines(session: Session, text: str, start: int = 0) -> None:
    """Count the lines of a solution, from `start` on, as answers after what stands before them."""
    for begun, line in list(_places(text))[start:]:
        session.memo.setdefault(begun, []).append(line)


def _places(text: str) -> Iterator[tuple[str, str]]:
    """Each line, and the text before it."""
    pieces = pieces_of(text)
    return zip(["", *accumulate(pieces)], (piece.strip() for piece in pieces), strict=False)


async def rounds_on_lines(session: Session, chain: Proposal) -> None:
    """Verify all lines, let the first outvoted one give way, go on from there: until none is, or R times."""
    session.stop = "rounds"
    for number in range(1, session.config.rounds + 1):
        with session.trace.span("round", "round", number=number):
            chain = await check_lines(session, chain)
            places = [index for index, step in enumerate(chain.steps) if await outvoted(session, step, same_line)]
            session.trace.point(
                "selected", indices=places[:1], hints={str(i): chain.steps[i].majority for i in places[:1]}
            )
            if not places:
                session.stop = "agreed"
                return
            chain = await go_on_from(session, chain, places[0])


async def check_lines(session: Session, proposal: Proposal) -> Proposal:
    """Re-answer every line, all at once; what stands before a line is taken as it is."""
    with session.trace.span("stage", "verify"):
        places = enumerate(_places(proposal.text))
        checked = await together(_check_line(session, begun, line, index) for index, (begun, line) in places)
        return session.checked(proposal, checked)


async def _check_line(session: Session, begun: str, line: str, index: int) -> CheckedStep:
    step = Step(f"line {index + 1}", line)
    with session.trace.span("step", "step", index=index, question=step.question, answer=line) as span:
        messages, known = session.prompts.go_on(session.question, begun), session.memo.get(begun, [])
        read = partial(_line_after, begun)
        answers = await sample_answers(session, messages, read, known, same=same_line, stop=("\n",))
        session.memo[begun] = answers
        if len(answers) > len(known) and not any(answers[len(known) :]):
            session.fallback("lines not checked", "the model does not go on with a reply that was begun")
        checked = await weigh(session, step, answers, same_line)
        span.data.update({k: v for k, v in checked.to_json(index).items() if k not in ("index", "question", "answer")})
    return checked


def _line_after(begun: str, reply: Completion) -> str | None:
    """The line that a reply goes on with. None when there is none, or it begins the solution anew: then the server
    ignored what was begun."""
    line = final_text(reply.text).strip()
    anew = bool(begun) and line == pieces_of(begun)[0].strip()
    return None if anew else line or None


async def same_line(session: Session, a: str, b: str) -> bool:
    """Whether two lines say the same."""
    (left, value), (other_left, other_value) = (_sides(line) for line in (a, b))
    if left is None and other_left is None:
        return value == other_value or await session.same(value, other_value)
    return left == other_left and (value == other_value or await session.same(value, other_value))


def _sides(line: str) -> tuple[str | None, str]:
    left, sign, value = " ".join(line.split()).rpartition("=")
    return (left.rstrip() if sign else None), value.strip()


async def go_on_from(session: Session, proposal: Proposal, index: int) -> Proposal:
    """A solution up to a line, the majority in its place, and how the model goes on from there."""
    pieces, majority = pieces_of(proposal.text), proposal.steps[index].majority
    ending = pieces[index][len(pieces[index].rstrip()) :] or "\n"
    begun = "".join([*pieces[:index], majority or "", ending])
    with session.trace.span("stage", "refine"):
        rest = await session.text("refine", session.prompts.go_on(session.question, begun))
        mended = session.propose(proposal.round + 1, begun + rest)
    note_lines(session, mended.text, start=index + 1)
    return mended
