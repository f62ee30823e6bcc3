"""The parts of a Socratic round: decompose, re-solve, confidence, select, refine (arXiv 2511.10621, section 3).

Every step is re-answered given the *stated* answers before it, so a mistake shows at the step where it was made and
not in those that follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from luthier.llm.types import Completion, Message
from luthier.reason.checkers import check_step
from luthier.reason.prompts import Finding, Step
from luthier.reason.replies import Unreadable, after_evaluation, read_score, read_steps
from luthier.reason.session import CheckedStep, Proposal, Session, together
from luthier.reason.votes import UNREAD, decided, tally, tally_raw
from luthier.tasks.answers import extract_answer

Same = Callable[[Session, str, str], Awaitable[bool]]


async def check(session: Session, proposal: Proposal) -> Proposal:
    """Decompose a solution and verify its steps; the proposal as it was when it could not be decomposed."""
    steps = await decompose(session, proposal)
    return await verify(session, proposal, steps) if steps else proposal


async def decompose(session: Session, proposal: Proposal) -> list[Step] | None:
    """The steps that a solution takes, or None (and a flag) when no reply could be read."""
    config = session.config
    first = session.prompts.decompose(session.question, proposal.text)
    messages, problem, steps = first, "", None
    with session.trace.span("stage", "decompose"):
        for attempt in range(config.decompose_attempts):
            as_json = config.prompts == "full" and not (config.reference_compat and attempt)
            reply = await session.text("decompose", messages, temperature=config.decompose_temperature, json=as_json)
            try:
                steps = _tidy(read_steps(reply), config.max_steps)
                problem = await _uncovered(session, steps, proposal.answer)
            except Unreadable as error:
                problem = str(error)
            if not problem:
                return steps
            messages = session.prompts.repair(first, reply, problem)
    if steps is None:
        session.fallback("steps not checked", f"no readable decomposition in {config.decompose_attempts} replies")
    else:
        session.fallback("final answer not covered by the steps", problem)
    return steps


def _tidy(steps: Sequence[Step], most: int) -> list[Step]:
    kept = list(dict.fromkeys(steps))  # said twice is one step
    if len(kept) > most:
        raise Unreadable(f"it has {len(kept)} steps, at most {most} are allowed")
    return kept


async def _uncovered(session: Session, steps: Sequence[Step], answer: str | None) -> str:
    """What is wrong with the end of a decomposition, '' when it ends in the solution's answer."""
    if not session.config.coverage or answer is None or await session.same(answer, steps[-1].answer):
        return ""
    return f"the last answer is {steps[-1].answer}, but the solution's final answer is {answer}"


async def verify(session: Session, proposal: Proposal, steps: Sequence[Step]) -> Proposal:
    """Re-answer every step, all at once, and note how far each stated answer is confirmed."""
    with session.trace.span("stage", "verify"):
        checked = await together(_verify_step(session, steps, index) for index in range(len(steps)))
        return session.checked(proposal, checked)


async def _verify_step(session: Session, steps: Sequence[Step], index: int) -> CheckedStep:
    step, earlier = steps[index], steps[:index]
    with session.trace.span("step", "step", index=index, question=step.question, answer=step.answer) as span:
        checked = await _by_checker(session, earlier, step) or await _by_votes(session, earlier, step)
        span.data.update({k: v for k, v in checked.to_json(index).items() if k not in ("index", "question", "answer")})
    return checked


async def _by_checker(session: Session, earlier: Sequence[Step], step: Step) -> CheckedStep | None:
    verdict = check_step(session.config.checkers, session.question, earlier, step)
    if verdict is None:
        return None
    if not verdict.holds and verdict.value is None:
        return await _refuted(session, earlier, step)
    value = step.answer if verdict.holds else verdict.value
    return CheckedStep(step, (), float(verdict.holds), verdict.holds, value, "checker")


async def _refuted(session: Session, earlier: Sequence[Step], step: Step) -> CheckedStep:
    """A step that a checker found wrong and cannot mend: its majority is that of the re-answers that are not refuted.

    One that the checker proves needs no majority.
    """
    key = (tuple(earlier), step.question)
    if key not in session.memo:
        messages = session.prompts.step(session.question, earlier, step.question)
        replies = await session.ask("step", messages, n=session.config.samples)
        session.memo[key] = [extract_answer(reply.text) for reply in replies]
    votes = await session.tally(session.memo[key])
    names, question = session.config.checkers, session.question
    verdicts = [check_step(names, question, earlier, replace(step, answer=vote.answer)) for vote in votes]
    proven = [vote for vote, verdict in zip(votes, verdicts, strict=True) if verdict and verdict.holds]
    open_ = [vote for vote, verdict in zip(votes, verdicts, strict=True) if verdict is None]
    leaders = proven or [vote for vote in open_ if vote.count >= session.config.min_votes]
    counts = tuple((vote.answer, vote.count) for vote in votes)
    return CheckedStep(step, counts, 0.0, False, leaders[0].answer if leaders else None, "checker")


async def _by_votes(session: Session, earlier: Sequence[Step], step: Step) -> CheckedStep:
    key = (tuple(earlier), step.question)
    known = session.memo.get(key) if session.config.reuse_votes else None
    if known is not None:
        return replace(await weigh(session, step, known), decided_by="memo")
    answers, trusted = await resolve(session, earlier, step)
    session.memo[key] = answers
    checked = await weigh(session, step, answers)
    return replace(checked, decided_by="trust") if trusted else checked


async def resolve(session: Session, earlier: Sequence[Step], step: Step) -> tuple[list[str | None], bool]:
    """Up to M re-answers of a step (None: unreadable), and whether the first one was trusted by itself."""
    messages = session.prompts.step(session.question, earlier, step.question)
    answers: list[str | None] = []
    if session.config.trust is not None:
        (first,) = await session.ask("step", messages, logprobs=True)
        answers.append(extract_answer(first.text))
        if await _trusted(session, first, step.answer):
            return answers, True
    return await sample_answers(session, messages, _answer_of, answers), False


def _answer_of(reply: Completion) -> str | None:
    return extract_answer(reply.text)


async def sample_answers(
    session: Session,
    messages: Sequence[Message],
    read: Callable[[Completion], str | None],
    known: Sequence[str | None] = (),
    *,
    same: Same = Session.same,
    stop: Sequence[str] = (),
) -> list[str | None]:
    """Re-answers to one question, M of them or until their majority stands; `known` are those that there are."""
    config, answers = session.config, list(known)
    while len(answers) < config.samples:
        left = config.samples - len(answers)
        if config.early_decision and decided(await tally(answers, partial(same, session)), left):
            break
        # A majority of all samples is the soonest that anything can be decided; then one by one.
        n = min(left, max(config.samples // 2 + 1 - len(answers), 1)) if config.early_decision else left
        answers += map(read, await session.ask("step", messages, n=n, first_sample=len(answers), stop=stop))
    return answers


async def _trusted(session: Session, reply: Completion, stated: str) -> bool:
    answer = extract_answer(reply.text)
    if answer is None or reply.logprobs is None or not await session.same(stated, answer):
        return False
    return answer_probability(reply, answer) >= (session.config.trust or 1.0)


def answer_probability(reply: Completion, answer: str) -> float:
    """Probability (0 to 1) of the tokens that spell the answer where it is last written; 0 when they are not found."""
    tokens = reply.logprobs or ()
    text = "".join(token.token for token in tokens)
    start = text.rfind(answer)
    if start < 0:
        return 0.0
    position, total = 0, 0.0
    for token in tokens:
        if position < start + len(answer) and position + len(token.token) > start:
            total += token.logprob
        position += len(token.token)
    return math.exp(total)


async def weigh(session: Session, step: Step, answers: Sequence[str | None], same: Same = Session.same) -> CheckedStep:
    """Confidence and majority of a step from its re-answers."""
    config = session.config
    raw = config.reference_compat
    votes = tally_raw(answers) if raw else await tally(answers, partial(same, session))
    leader = votes[0] if votes and votes[0].count >= config.min_votes else None
    majority = leader.answer if leader else None
    counts = tuple((vote.answer, vote.count) for vote in votes)
    if config.confidence == "judged":
        score = await session.match_score(step.answer, [UNREAD if a is None else a for a in answers])
        agrees = score == config.perfect_score
        return CheckedStep(step, counts, None if score is None else score / 5, agrees, majority, "judge")
    matching = [
        vote
        for vote in votes
        if vote.answer == step.answer or (not raw and await same(session, step.answer, vote.answer))
    ]
    matches = sum(vote.count for vote in matching)
    # A tie is no reason to change anything.
    agrees = leader is None or leader in matching or leader.count <= matches
    return CheckedStep(step, counts, matches / len(answers), agrees, majority, "votes")


async def select(session: Session, proposal: Proposal) -> list[Finding]:
    """The steps to mend, in the order of the solution; none when nothing is in doubt.

    With the guard: steps whose majority differs from what is stated. Without: the least confident step, whatever its
    majority says (as published: the hint may even equal the stated answer).
    """
    config, steps = session.config, proposal.steps
    if config.guard:
        doubted = [i for i, step in enumerate(steps) if _is_refuted(step) or await outvoted(session, step)]
    else:
        sure = all(step.confidence == 1.0 for step in steps)
        doubted = [] if sure else [i for i, step in enumerate(steps) if step.majority is not None or _is_refuted(step)]
    if config.fix == "first" or not config.guard:
        doubted = sorted(doubted, key=lambda index: _rank(session, steps[index]))[:1]
    findings = [
        Finding(steps[index].step, steps[index].majority, asserted=place == 0) for place, index in enumerate(doubted)
    ]
    session.trace.point("selected", indices=doubted, hints={str(i): steps[i].majority for i in doubted})
    return findings


def _is_refuted(step: CheckedStep) -> bool:
    return step.decided_by == "checker" and not step.agrees


async def outvoted(session: Session, step: CheckedStep, same: Same = Session.same) -> bool:
    """Whether the re-answers of a step have a majority, and it is not what the solution states."""
    return not step.agrees and step.majority is not None and not await same(session, step.step.answer, step.majority)


def _rank(session: Session, step: CheckedStep) -> float:
    """Order of doubt, lowest first. An unreadable score counts lowest as published, highest in ours."""
    if step.confidence is None:
        return -1.0 if session.config.reference_compat else 2.0
    return step.confidence


async def refine(session: Session, proposal: Proposal, findings: Sequence[Finding]) -> Proposal:
    """The model solves again, its own solution and a reflection on the doubted steps before its eyes."""
    ask = session.prompts.patch if session.config.patch else session.prompts.refine
    with session.trace.span("stage", "refine"):
        reply = await session.text("refine", ask(session.question, proposal.text, findings))
        return session.propose(proposal.round + 1, after_evaluation(reply))


@dataclass(frozen=True)
class Verdict:
    """A judge's words on a whole solution, and the score 0 to 5 in them (None: unreadable)."""

    text: str
    score: int | None


async def judge(session: Session, proposal: Proposal) -> Verdict:
    """Have a whole solution judged."""
    with session.trace.span("stage", "judge") as span:
        reply = await session.text("judge", session.prompts.judge(session.question, proposal.text))
        score = read_score(reply, 5)
        span.data["score"] = score
    if score is None:
        session.flag("a judgement could not be read")
    return Verdict(reply, score)


def content(session: Session, verdict: Verdict) -> bool:
    """Whether a judge finds nothing wrong. An unreadable verdict finds nothing; as published, it counts as a fault."""
    if verdict.score is None:
        return not session.config.reference_compat
    return verdict.score == session.config.perfect_score


async def rewrite(session: Session, proposal: Proposal, verdict: Verdict) -> Proposal:
    """The model solves again after a judge's words."""
    with session.trace.span("stage", "refine"):
        messages = session.prompts.rewrite(session.question, proposal.text, verdict.text)
        return session.propose(proposal.round + 1, after_evaluation(await session.text("refine", messages)))
