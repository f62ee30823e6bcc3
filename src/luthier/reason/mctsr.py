"""Monte Carlo tree self-refine (arXiv 2406.07394): a tree of rewrites, searched by sampled rewards.

Two faults of the published code are mended, and come back under `reference_compat`: the refining call does not see the
answer that it refines, and a dummy answer ("I don't know") is in the tree and can win. No ground truth is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from luthier.llm.types import Message
from luthier.reason.replies import after_evaluation, read_score
from luthier.reason.session import Proposal, Session

EXPLORATION = 1.4
MOST_CHILDREN = 3
SURE = 95
"""A first answer rewarded higher than this (of 100) is taken at once."""


@dataclass(eq=False)
class Node:
    """A solution in the tree with the rewards (0 to 100) sampled for it."""

    index: int
    """Of its proposal; -1 for the dummy."""
    text: str
    parent: Node | None = None
    rewards: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    @property
    def quality(self) -> float:
        """Worst and mean reward count equally; a better child lifts its parent half-way."""
        own = (min(self.rewards) + sum(self.rewards) / len(self.rewards)) / 2
        return (own + max(child.quality_alone for child in self.children)) / 2 if self.children else own

    @property
    def quality_alone(self) -> float:
        """As `quality`, without the children."""
        return (min(self.rewards) + sum(self.rewards) / len(self.rewards)) / 2

    @property
    def bound(self) -> float:
        """Upper confidence bound."""
        above = len(self.parent.rewards) if self.parent else 0
        return self.quality + EXPLORATION * math.sqrt(math.log(above + 1) / (len(self.rewards) + 1e-5))

    @property
    def worth(self) -> float:
        """What the final choice goes by."""
        return 0.5 * min(self.rewards) + 0.3 * len(self.rewards) + 0.2 * self.bound


async def mctsr(session: Session) -> None:
    """Expand the most promising node, `iterations` times; answer with the node of highest worth."""
    config = session.config
    chain = session.propose(0, await session.text("solve", session.prompts.solve(session.question)))
    nodes = [Node(0, chain.text)]
    await _reward(session, nodes[0])
    if nodes[0].rewards[0] > SURE:
        session.chosen = 0
        return
    if config.reference_compat:
        nodes.append(Node(-1, "I don't know."))
        await _reward(session, nodes[1])
    for number in range(1, config.iterations + 1):
        with session.trace.span("round", "round", number=number):
            open_ = [n for n in nodes if len(n.children) < MOST_CHILDREN or _beats_children(n)]
            node = max(open_, key=lambda n: n.bound)
            await _reward(session, node)
            proposal = await _rewrite(session, node, number)
            child = Node(len(session.proposals) - 1, proposal.text, node)
            await _reward(session, child)
            node.children.append(child)
            nodes.append(child)
    best = max(nodes, key=lambda n: n.worth)
    if best.index < 0:
        session.stop = "no answer"
    session.chosen = max(best.index, 0)


def _beats_children(node: Node) -> bool:
    return all(node.quality > child.quality for child in node.children)


async def _reward(session: Session, node: Node) -> None:
    with session.trace.span("stage", "judge"):
        reply = await session.text("judge", session.prompts.reward(session.question, node.text))
        score = read_score(reply, 100)
    if score is None:
        session.flag("some rewards could not be read and count as 0")
    node.rewards.append(score or 0)


async def _rewrite(session: Session, node: Node, number: int) -> Proposal:
    ask: list[Message] = session.prompts.critique(session.question, node.text)
    feedback = await session.text("judge", ask)
    text = "" if session.config.reference_compat else node.text
    with session.trace.span("stage", "refine"):
        reply = await session.text("refine", session.prompts.rewrite(session.question, text, feedback))
        return session.propose(number, after_evaluation(reply))
