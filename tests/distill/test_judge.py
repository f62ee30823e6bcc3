from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from luthier.core.errors import EndpointError
from luthier.distill.judge import (
    Judgement,
    JudgeSettings,
    Pair,
    Verdict,
    at_equal_length,
    by_length,
    compare,
    first_requests,
    length_controlled,
    matched,
    rate,
    read_scores,
    read_verdict,
    references,
    summarize,
)
from luthier.llm.scripted import Reply, ScriptedBackend
from luthier.llm.types import Completion, Request

SHOWN = re.compile(r"=== Reply 1 ===\n(.*?)\n\n=== Reply 2 ===\n(.*?)\n\n=== End", re.DOTALL)
Opinion = Callable[[str, str], str]


def judging(opinion: Opinion) -> ScriptedBackend:
    """A judge who sees the two replies in the order in which they are shown."""

    def reply(request: Request, index: int) -> Reply:
        shown = SHOWN.search(request.messages[0]["content"])
        assert shown
        return opinion(shown[1], shown[2])

    return ScriptedBackend(reply)


def run(opinion: Opinion, pairs: list[Pair], protocol: Callable[..., object] = compare, **settings: int) -> Verdict:
    async def work() -> object:
        return await protocol(judging(opinion), pairs, JudgeSettings(**settings))  # type: ignore[misc]

    verdict = asyncio.run(work())  # type: ignore[arg-type]
    assert isinstance(verdict, Verdict)
    return verdict


def better(first: str, second: str) -> str:
    """A judge who knows that 'good' is better than 'bad', and sees no other difference."""
    if first.split()[0] == second.split()[0]:
        return "They are alike.\nVerdict: tie"
    return f"One of them is good.\n**Verdict: {1 if first.startswith('good') else 2}**"


def first_one(first: str, second: str) -> str:
    return "Verdict: 1"


def longer(first: str, second: str) -> str:
    return "Verdict: tie" if len(first) == len(second) else f"Verdict: {1 if len(first) > len(second) else 2}"


MIXED = [
    *(Pair(f"Q{number}", "good x", "bad x") for number in range(3)),
    Pair("Q3", "bad x", "good x"),
    *(Pair(f"Q{number}", "bad x", "bad y") for number in (4, 5)),
]


def test_a_fair_judge_is_counted() -> None:
    verdict = run(better, MIXED)
    assert (verdict.wins, verdict.ties, verdict.losses, verdict.unread) == (3, 2, 1, 0)
    assert verdict.rate.value == pytest.approx((3 + 2 * 0.5) / 6)
    assert verdict.rate.low < verdict.rate.value < verdict.rate.high
    assert (verdict.consistent, verdict.first_shown) == (1.0, 0.5)


def test_a_judge_who_always_names_the_first_says_nothing() -> None:
    verdict = run(first_one, MIXED)
    assert verdict.rate[:3] == (0.5, 0.5, 0.5)
    assert (verdict.wins, verdict.ties, verdict.losses) == (0, 6, 0)
    assert (verdict.consistent, verdict.first_shown) == (0.0, 1.0)


def test_a_habit_cancels_and_the_rest_of_the_opinion_stays() -> None:
    """Right with probability 1/2, else the one shown first: the true winner gets points 3/4 on average."""
    draw = random.Random(0)
    verdict = run(
        lambda a, b: better(a, b) if draw.random() < 0.5 else first_one(a, b), [Pair("Q", "good", "bad")] * 500
    )
    assert verdict.rate.value == pytest.approx(0.75, abs=0.03)
    assert verdict.first_shown == pytest.approx(0.75, abs=0.05)
    swapped = run(
        lambda a, b: better(a, b) if draw.random() < 0.5 else first_one(a, b), [Pair("Q", "bad", "good")] * 500
    )
    assert swapped.rate.value == pytest.approx(0.25, abs=0.03)


def test_verdicts_that_cannot_be_read_are_asked_for_again_and_then_left_out() -> None:
    answers = iter(["I like both.", "Verdict: 1", "Verdict: 2"])

    async def work() -> Verdict:
        backend = ScriptedBackend(lambda request, index: next(answers))
        verdict = await compare(backend, [Pair("Q", "a", "b")], JudgeSettings(at_once=1))
        assert [request.temperature for request in backend.requests] == [0.0, 0.7, 0.0]
        assert [request.first_sample for request in backend.requests] == [0, 1, 0]
        return verdict

    assert asyncio.run(work()).wins == 1
    silent = run(lambda a, b: "none" if "x" in a + b else better(a, b), [*MIXED, Pair("Q", "good", "bad")], tries=2)
    assert (silent.unread, silent.wins, silent.rate.n) == (6, 1, 1)
    with pytest.raises(EndpointError, match="no verdict on any of 6 pairs"):
        run(lambda a, b: "none", MIXED)


def test_a_verdict_in_one_order_only_counts_for_nothing() -> None:
    verdict = run(
        lambda a, b: "Verdict: 1" if a == "left" else "?", [Pair("Q", "left", "r"), Pair("Q", "left", "left")]
    )
    assert (verdict.unread, verdict.rate.value) == (1, 0.5)


def test_a_verdict_that_was_cut_off_is_none() -> None:
    cut = Completion(text="If the first is right, Verdict: 1", finish_reason="length")
    with pytest.raises(EndpointError, match="no verdict"):
        asyncio.run(compare(ScriptedBackend(lambda request, index: cut), MIXED))


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("Verdict: 1", 1.0),
        ("verdict:2.", 0.0),
        ("**Verdict:** Tie", 0.5),
        ("A verdict: 1 would be hasty.\nVerdict: 2", 0.0),
        ("Verdict: 12", None),
        ("Reply 1 is better", None),
    ],
)
def test_verdicts_are_read(text: str, points: float | None) -> None:
    assert read_verdict(text) == points


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Scores: 6 2\nThe first is better.", 0.75),
        ("**Scores: 8, 8**", 0.5),
        ("9 1", 0.9),
        ("Scores: 0 11\nScores: 5 5", 0.5),
        ("In 2 of 3 cases", None),
    ],
)
def test_scores_are_read(text: str, share: float | None) -> None:
    assert read_scores(text) == share


def test_score_ratios_are_averaged_over_both_orders() -> None:
    """A judge who gives the first shown reply two points more: 8 and 4 for a true 6 and 4, then 6 and 6."""
    marks = {"good": 6, "bad": 4}
    verdict = run(lambda a, b: f"Scores: {marks[a] + 2} {marks[b]}\nwhy", [Pair("Q", "good", "bad")], rate)
    assert verdict.rate.value == pytest.approx((8 / 12 + 6 / 12) / 2)


def test_length_does_not_pass_for_quality() -> None:
    pairs = [Pair(f"Q{n}", "x" * (30 if n < 5 else 10), "x" * 10) for n in range(10)]
    verdict = run(longer, pairs)
    assert verdict.rate.value == 0.75
    bins = by_length(verdict.judgements)
    assert [(found.low, found.high, found.rate.value) for found in bins] == [(0.8, 1.25, 0.5), (2.0, float("inf"), 1.0)]
    equal = matched(verdict.judgements)
    assert equal is not None
    assert equal[:] == (0.5, 0.5, 0.5, 5)
    assert matched(verdict.judgements[:5]) is None
    assert matched(verdict.judgements, length=lambda reply: 1).value == 0.75  # type: ignore[union-attr]


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Ten pairs of two prompts know as little as two: the interval reaches from all lost to all won."""
    pairs = [Pair("Q0", "good", "bad")] * 5 + [Pair("Q1", "bad", "good")] * 5
    assert run(better, pairs).rate == (0.5, 0.0, 1.0, 2)


def sized(first: int, second: int, points: float, number: int) -> Judgement:
    return Judgement(Pair(f"Q{number}", "x" * first, "x" * second), (points, points))


def test_what_length_explains_is_taken_out() -> None:
    """A judge who mostly prefers what is longer, and nothing else: the first ones are mostly longer, and no better."""
    lengths = [(30, 10)] * 60 + [(10, 30)] * 20 + [(20, 20)] * 20
    points = [0.9] * 60 + [0.1] * 20 + [0.5] * 20
    seen = [sized(*both, won, number) for number, (both, won) in enumerate(zip(lengths, points, strict=True))]
    assert summarize(seen).rate.value == pytest.approx(0.66)
    found = length_controlled(seen)
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=0.03)
    assert found.low - 0.01 < 0.5 < found.high
    assert found.n == 100


def test_quality_is_left_where_lengths_tell_nothing() -> None:
    equal = [sized(20, 20, won, number) for number, won in enumerate([1.0] * 15 + [0.0] * 5)]
    balanced = [sized(*both, won, n) for n, (both, won) in enumerate([((30, 10), 1.0), ((10, 30), 1.0)] * 15)]
    for seen, rate_left in ((equal, 0.75), (balanced, 1.0)):
        found = length_controlled(seen)
        assert found is not None
        assert found.value == pytest.approx(rate_left, abs=1e-4)


def test_the_fit_has_no_slope_left() -> None:
    """The optimum of the penalized likelihood, by its gradient from finite differences."""
    rng = np.random.default_rng(0)
    feature, weights = rng.normal(size=60), rng.integers(0, 3, 60).astype(float)
    points = (rng.random(60) < 1 / (1 + np.exp(-0.4 - 1.5 * feature))).astype(float)

    def loss(a: float, b: float) -> float:
        logits = a + b * feature
        return float(weights @ (np.logaddexp(0, logits) - points * logits) + b * b / (2 * 3**2))

    found = at_equal_length(points, feature, weights)
    a = float(np.log(found / (1 - found)))
    best = min(np.linspace(-3, 3, 6001), key=lambda b: loss(a, b))
    assert (loss(a + 1e-4, best) - loss(a - 1e-4, best)) / 2e-4 == pytest.approx(0, abs=2e-2)


def test_equal_lengths_that_were_never_seen_are_not_guessed() -> None:
    longer_all = [sized(30, 10 + number, 1.0, number) for number in range(9)]
    assert length_controlled(longer_all) is None
    assert length_controlled([Judgement(Pair("Q", "a", "b"), (None, 1.0))]) is None


def test_nothing_more_is_asked_after_a_failure_and_what_is_under_way_is_waited_for() -> None:
    answered = list[int]()

    class Failing(ScriptedBackend):
        async def complete(self, request: Request) -> list[Completion]:
            number = len(self.requests)
            found = await super().complete(request)
            if number == 2:
                raise EndpointError("down", hint="wait")
            await asyncio.sleep(0.02)
            answered.append(number)
            return found

    backend = Failing(lambda request, index: "Verdict: 1")
    with pytest.raises(EndpointError, match="down"):
        asyncio.run(compare(backend, MIXED, JudgeSettings(at_once=4)))
    assert (len(backend.requests), sorted(answered)) == (4, [0, 1, 3])


def test_what_will_be_asked_is_known_before() -> None:
    pairs = [*MIXED, Pair("Q0", "good x", "bad x"), Pair("Q9", "same", "same")]
    assert len(first_requests(pairs, JudgeSettings())) == 2 * 6 + 1


def test_references_are_the_judges_own_answers() -> None:
    backend = ScriptedBackend(lambda request, index: f"about {request.messages[-1]['content']}")
    asked = ["a", [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]]
    assert asyncio.run(references(backend, asked)) == ["about a", "about b"]  # type: ignore[arg-type]
    cut = ScriptedBackend(lambda request, index: Completion(text="x", finish_reason="length"))
    with pytest.raises(EndpointError, match="ended with length"):
        asyncio.run(references(cut, ["a"]))
