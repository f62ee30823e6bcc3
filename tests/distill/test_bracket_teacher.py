from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import numpy as np
import pytest

from luthier.core.errors import ConfigError, DataError, EndpointError
from luthier.distill.bracket_teacher import BracketBackend, BracketTeacher
from luthier.llm.types import Request

SMALL = BracketTeacher(types=2, symbols=4, prompt_length=2, max_tokens=6)


def balanced(reply: str) -> bool:
    """By cancelling neighbors: another definition than a stack."""
    while reply != (reply := reply.replace("()", "").replace("[]", "")):
        pass
    return not reply


@pytest.mark.parametrize("prompt", SMALL.prompts(3))
def test_probabilities_are_those_of_all_replies_enumerated(prompt: str) -> None:
    replies = list(SMALL.support(prompt))
    nats = [SMALL.log_probability(prompt, reply) for reply in replies]
    assert len(replies) == sum(2**pairs * count for pairs, count in ((1, 1), (2, 2), (3, 5)))  # Catalan numbers
    assert all(map(balanced, replies))
    assert math.fsum(map(math.exp, nats)) == pytest.approx(1, abs=1e-12)
    assert SMALL.entropy(prompt) == pytest.approx(-math.fsum(math.exp(value) * value for value in nats), abs=1e-12)
    lengths = np.zeros(7)
    for reply, value in zip(replies, nats, strict=True):
        lengths[len(reply)] += math.exp(value)
    np.testing.assert_allclose(SMALL.length_distribution(prompt), lengths, atol=1e-12)


def test_samples_have_these_probabilities() -> None:
    (prompt,), draw, count = SMALL.prompts(1), random.Random(0), 10_000
    found = Counter(SMALL.draw(prompt, draw) for _ in range(count))
    excess = 0.0
    for reply in SMALL.support(prompt):
        expected = count * math.exp(SMALL.log_probability(prompt, reply))
        excess += (found[reply] - expected) ** 2 / expected
    assert found.total() == sum(found[reply] for reply in SMALL.support(prompt))
    assert excess < 54 + 5 * math.sqrt(2 * 53)  # chi-square, 53 degrees of freedom


@pytest.mark.parametrize("reply", ["", ")", "(", "(]", "()x", "()" * 4, "([)]"])
def test_what_the_teacher_cannot_write(reply: str) -> None:
    assert SMALL.log_probability("ab", reply) == -math.inf
    assert not SMALL.is_valid("ab", reply)


def test_conditionals_sum_to_one_until_the_reply_breaks() -> None:
    rows = SMALL.conditionals("ab", "(]()")
    np.testing.assert_allclose(rows[:2].sum(1), 1)
    assert rows.shape == (5, 5)
    assert np.isnan(rows[2:]).all()


def test_prompts_are_different_and_seeded() -> None:
    assert sorted(SMALL.prompts(16)) == sorted(a + b for a in "abcd" for b in "abcd")
    assert SMALL.prompts(5, seed=1) == SMALL.prompts(5, seed=1) != SMALL.prompts(5, seed=2)
    assert SMALL.prompts(5, seed=1) == SMALL.prompts(9, seed=1)[:5]
    with pytest.raises(ConfigError, match="expected 1 to 16"):
        SMALL.prompts(17)
    with pytest.raises(DataError, match="no prompt of this teacher"):
        SMALL.rates("az")


def test_a_prompt_sets_length_and_types_and_spread_sets_how_much() -> None:
    def mean_lengths(spread: float) -> list[float]:
        teacher = BracketTeacher(opening_spread=spread)
        return [float(teacher.length_distribution(p) @ np.arange(31)) for p in teacher.prompts(64)]

    assert np.std(mean_lengths(0.0)) == pytest.approx(0)
    assert 1 < np.std(mean_lengths(0.3)) < np.std(mean_lengths(0.6))
    even = BracketTeacher(type_spread=0.0)
    np.testing.assert_allclose(even.rates("abc")[1], 1 / 3)


def test_the_default_is_as_large_as_the_source_it_follows() -> None:
    teacher = BracketTeacher()
    prompts = teacher.prompts(512)
    assert np.mean([teacher.entropy(p) for p in prompts]) == pytest.approx(13.01, abs=0.01)  # §8.3: 12.36
    lengths = [teacher.length_distribution(p) @ np.arange(31) for p in prompts]
    assert np.mean(lengths) == pytest.approx(13.08, abs=0.01)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_tokens is 7"):
        BracketTeacher(max_tokens=7)
    assert SMALL.tokens == "([)]"
    assert SMALL.model.startswith("brackets:types=2,symbols=4,")
    assert "tokens=([" not in SMALL.model


def complete(request: Request) -> list[tuple[str, str]]:
    return [(c.text, c.finish_reason) for c in asyncio.run(BracketBackend(SMALL).complete(request))]


def test_the_backend_gives_sample_k_whether_asked_alone_or_not() -> None:
    both = complete(Request(prompt="ab", n=4, seed=3))
    assert both[2:3] == complete(Request(messages=[{"role": "user", "content": "ab"}], first_sample=2, seed=3))
    assert all(SMALL.is_valid("ab", text) for text, _ in both)
    assert both != complete(Request(prompt="ab", n=4, seed=4))


def test_the_backend_cuts_at_max_tokens_and_obeys_temperature() -> None:
    greedy = {text for text, _ in complete(Request(prompt="ab", n=5, temperature=0, seed=0))}
    assert len(greedy) == 1
    assert complete(Request(prompt="ab", temperature=0, max_tokens=1)) == [(min(greedy)[:1], "length")]
    with pytest.raises(EndpointError, match="temperature"):
        complete(Request(prompt="ab", top_p=0.5))
    with pytest.raises(EndpointError, match="no prompt of this teacher"):
        complete(Request(prompt="Hello"))


def test_the_backend_scores_what_it_can_write() -> None:
    backend, reply = BracketBackend(SMALL), "([])"
    score = asyncio.run(backend.score("ab", reply))
    ending = SMALL.conditionals("ab", reply)[-1, SMALL.end]
    assert score.logprob + math.log(ending) == pytest.approx(SMALL.log_probability("ab", reply))
    with pytest.raises(EndpointError, match="never writes"):
        asyncio.run(backend.score("ab", "(]"))
