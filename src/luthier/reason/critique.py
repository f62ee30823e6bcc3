"""Baselines that work on whole solutions: Self-Refine (arXiv 2303.17651) and debate (arXiv 2305.14325)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from luthier.reason.replies import after_evaluation
from luthier.reason.session import Proposal, Session, together
from luthier.reason.steps import judge, rewrite


async def self_refine(session: Session) -> None:
    """Judge and rewrite, R times; ours stops when the judge is content, as the original does.

    The published code never stops: nor does `reference_compat`.
    """
    config = session.config
    chain = session.propose(0, await session.text("solve", session.prompts.solve(session.question)))
    session.stop = "rounds"
    for number in range(1, config.rounds + 1):
        with session.trace.span("round", "round", number=number):
            verdict = await judge(session, chain)
            if verdict.score == config.perfect_score and not config.reference_compat:
                session.stop = "agreed"
                return
            chain = await rewrite(session, chain, verdict)


async def debate(session: Session) -> None:
    """Agents solve, then R times solve again with the others' last solutions in view; the plurality answers.

    The published code takes a random agent's answer: so does `reference_compat`, with a seed.
    """
    config = session.config
    solve = session.prompts.solve(session.question)
    with session.trace.span("round", "round", number=0):
        if config.reference_compat:  # a request for each, as published
            texts = await together(session.text("solve", solve) for _ in range(config.agents))
        else:
            texts = [reply.text for reply in await session.ask("solve", solve, n=config.agents)]
        agents = [session.propose(0, text) for text in texts]
    for number in range(1, config.rounds + 1):
        with session.trace.span("round", "round", number=number):
            texts = await together(_again(session, agents, index) for index in range(len(agents)))
            agents = [session.propose(number, text) for text in texts]
    last = len(session.proposals) - len(agents)
    if config.reference_compat:
        session.chosen = last + random.Random(session.seed).randrange(len(agents))
    elif votes := await session.tally([agent.answer for agent in agents]):
        session.chosen = last + votes[0].members[0]


async def _again(session: Session, agents: Sequence[Proposal], index: int) -> str:
    others = [agent.text for place, agent in enumerate(agents) if place != index]
    messages = session.prompts.debate(session.question, agents[index].text, others)
    return after_evaluation(await session.text("solve", messages))
