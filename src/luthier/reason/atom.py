"""Atom of Thoughts (arXiv 2502.12018): solve, decompose with dependencies, contract to a simpler question, again."""

from __future__ import annotations

from luthier.reason.prompts import Step
from luthier.reason.replies import Unreadable, read_dependencies, read_tag
from luthier.reason.session import Session

ATTEMPTS = 3
"""Rounds of asking for a decomposition that is not empty, each with one repair."""


async def atom(session: Session) -> None:
    """R contractions, then one solution out of the R + 1, written for the original question.

    The published code asks for that last one with the contracted question: so does `reference_compat`.
    """
    question = session.question
    for number in range(session.config.rounds + 1):
        with session.trace.span("round", "round", number=number):
            solution = session.propose(number, await session.text("solve", session.prompts.solve(question)))
            parts = await _decompose(session, question, solution.text)
            if number < session.config.rounds:
                question = await _contract(session, question, parts)
    asked = question if session.config.reference_compat else session.question
    texts = [proposal.text for proposal in session.proposals]
    with session.trace.span("stage", "vote"):
        reply = await session.text("solve", session.prompts.ensemble(asked, texts))
        session.propose(session.config.rounds + 1, reply)


async def _decompose(session: Session, question: str, text: str) -> list[tuple[Step, tuple[int, ...]]]:
    first = session.prompts.dependencies(question, text)
    for _ in range(ATTEMPTS):
        messages = first
        for _ in range(2):
            reply = await session.text("decompose", messages, temperature=session.config.decompose_temperature)
            try:
                return read_dependencies(reply)
            except Unreadable as error:
                messages = session.prompts.repair(first, reply, str(error))
    session.fallback("question not contracted", f"no readable decomposition in {ATTEMPTS} attempts")
    return []


async def _contract(session: Session, question: str, parts: list[tuple[Step, tuple[int, ...]]]) -> str:
    known = [step for step, depends in parts if not depends]
    unsolved = [step for step, depends in parts if depends]
    if not parts:
        return question
    reply = await session.text("plan", session.prompts.contract(question, known, unsolved))
    simpler = read_tag(reply, "question")
    if simpler is None:
        session.fallback("question not contracted", "the reply has no question")
    return simpler or question
