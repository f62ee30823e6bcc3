"""Baselines that only sample: one chain of thought, the majority of K, the best of K as a judge sees them."""

from __future__ import annotations

from luthier.reason.session import Proposal, Session, together
from luthier.reason.steps import judge
from luthier.reason.votes import UNREAD, tally_raw


async def cot(session: Session) -> None:
    """One chain of thought (arXiv 2201.11903)."""
    session.propose(0, await session.text("solve", session.prompts.solve(session.question)))


async def maj(session: Session) -> None:
    """The most common of K answers (self-consistency, arXiv 2203.11171), equal in meaning, not in spelling.

    The published code counts spellings: so does `reference_compat`.
    """
    proposals = await _sample(session)
    answers = [proposal.answer for proposal in proposals]
    raw = session.config.reference_compat
    votes = [v for v in tally_raw(answers) if v.answer != UNREAD] if raw else await session.tally(answers)
    session.trace.point("votes", votes=[{"answer": vote.answer, "count": vote.count} for vote in votes])
    if votes:
        session.chosen = votes[0].members[0]


async def best_of_n(session: Session) -> None:
    """The chain that the judge scores highest; among equals the most common answer, then the first."""
    proposals = await _sample(session)
    scores = [verdict.score for verdict in await together(judge(session, proposal) for proposal in proposals)]
    votes = await session.tally([proposal.answer for proposal in proposals])
    common = {index: vote.count for vote in votes for index in vote.members}

    def worth(index: int) -> tuple[bool, int, int, int]:
        score = scores[index]
        return proposals[index].answer is not None, -1 if score is None else score, common.get(index, 0), -index

    session.chosen = max(range(len(proposals)), key=worth)


async def _sample(session: Session) -> list[Proposal]:
    with session.trace.span("stage", "solve"):
        replies = await session.ask("solve", session.prompts.solve(session.question), n=session.config.votes)
        return [session.propose(0, reply.text) for reply in replies]
