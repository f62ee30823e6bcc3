"""Socratic Self-Refine in its three forms: linear, adaptive, with a plan (arXiv 2511.10621, algorithm 1).

R means R refinements here. The published code makes R + 1 and checks once more; `reference_compat` does the same. Ours
stops by itself when no step is outvoted.
"""

from __future__ import annotations

from luthier.reason.lines import note_lines, rounds_on_lines
from luthier.reason.prompts import Finding
from luthier.reason.replies import read_score, read_tag
from luthier.reason.session import Proposal, Session
from luthier.reason.steps import check, content, judge, refine, rewrite, select


async def ssr_lin(session: Session) -> None:
    """One chain, then rounds of checking its steps and mending what is outvoted."""
    chain = await first_chain(session)
    if chain is not None and session.config.steps == "lines":
        await rounds_on_lines(session, chain)
    elif chain is not None:
        await socratic_rounds(session, chain)


async def ssr_ada(session: Session) -> None:
    """As SSR-Lin, but a judge of the whole solution goes first: what it finds wrong is rewritten at once."""
    chain = await first_chain(session)
    if chain is not None:
        await socratic_rounds(session, chain, judge_first=True)


async def ssr_plan(session: Session) -> None:
    """As SSR-Ada, after the plan behind the first chain was examined and, unless perfect, improved."""
    chain = await first_chain(session)
    if chain is not None:
        await socratic_rounds(session, await better_plan(session, chain), judge_first=True)


async def socratic_rounds(session: Session, chain: Proposal, *, judge_first: bool = False) -> None:
    """Judge (SSR-Ada), decompose, verify, select, refine: until nothing is in doubt, or R refinements are done."""
    config = session.config
    refinements = config.rounds + config.reference_compat
    checks = refinements + (config.reference_compat or config.final == "best")
    session.stop = "rounds"
    for number in range(1, checks + 1):
        with session.trace.span("round", "round", number=number):
            verdict = await judge(session, chain) if judge_first else None
            findings: list[Finding] = []
            if verdict is None or content(session, verdict):
                chain = await check(session, chain)
                findings = await select(session, chain)
                if chain.steps and not findings and not config.reference_compat:
                    session.stop = "agreed"
                    return
            if not findings and verdict is None:
                verdict = await judge(session, chain)
            if number > refinements:
                return
            if findings:
                chain = await refine(session, chain, findings)
            elif verdict is None or (config.guard and content(session, verdict)):
                return  # the steps could not be checked, and the judge finds nothing wrong
            else:
                chain = await rewrite(session, chain, verdict)


async def first_chain(session: Session) -> Proposal | None:
    """The chain to work on. Of several, that with the most common answer; None (done) when all of them agree."""
    config = session.config
    with session.trace.span("round", "round", number=0), session.trace.span("stage", "solve"):
        replies = await session.ask("solve", session.prompts.solve(session.question), n=config.chains)
        proposals = [session.propose(0, reply.text) for reply in replies]
        if config.steps == "lines":
            for proposal in proposals:
                note_lines(session, proposal.text)
        if config.chains == 1:
            return proposals[0]
        votes = await session.tally([proposal.answer for proposal in proposals])
        best = proposals[votes[0].members[0] if votes else 0]
        session.proposals[:] = [best]
        agreed = len(votes) == 1 and votes[0].count == config.chains
        if agreed:
            session.stop = "agreed"
        return None if agreed else best


async def better_plan(session: Session, chain: Proposal) -> Proposal:
    """The same chain when its plan is perfect, otherwise a new one along an improved plan."""
    with session.trace.span("round", "plan", number=0), session.trace.span("stage", "plan"):
        reply = await session.text("plan", session.prompts.plan(session.question, chain.text))
        plan, critique = read_tag(reply, "summary"), read_tag(reply, "evaluation")
        score = read_score(f"<answer>{read_tag(reply, 'score') or ''}</answer>", 5)
        if score == session.config.perfect_score:
            return chain
        if plan is None and not session.config.reference_compat:
            session.fallback("plan not examined", "the reply has no summary of the plan")
            return chain
        messages = session.prompts.improve_plan(session.question, plan or "NA", critique or reply)
        better = read_tag(await session.text("plan", messages), "answer")
        if better is None and not session.config.reference_compat:
            session.fallback("plan not improved", "the reply has no plan")
            return chain
        solution = await session.text("solve", session.prompts.solve_with_plan(session.question, better or "NA"))
        return session.propose(0, solution)
