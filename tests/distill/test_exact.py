from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.data.tokenizer import train_bpe
from luthier.distill.bracket_teacher import BracketTeacher
from luthier.distill.exact import Gauged, _matched, gauge, matched_difference, reply_logprobs, teacher_replies
from luthier.distill.lessons import prompt_encoder
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

TEACHER = BracketTeacher(max_tokens=8)


@pytest.fixture(scope="module")
def network():
    """A small student with random weights and a token for each byte."""
    tokenizer = train_bpe(["abc"], 258)
    config = InstellaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = InstellaForCausalLM(config)
    initialize(model, 0)
    return model.eval(), tokenizer


class TheTeacherItself:
    """A model that knows the teacher's probabilities: what it is asked for are raw prompts of three bytes."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        ids = [tokenizer(character)["input_ids"] for character in TEACHER.tokens]
        self.columns = [*(token for (token,) in ids), tokenizer.eos_token_id]

    def __call__(self, input_ids, attention_mask, use_cache):
        logits = torch.full((*input_ids.shape, 258), -math.inf)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            text = self.tokenizer.decode(ids[: int(mask.sum())]).removesuffix("<|endoftext|>")
            known = TEACHER.conditionals(text[:3], text[3:])
            logits[row, 2 : 2 + len(known), self.columns] = torch.tensor(np.log(np.maximum(known, 1e-300))).float()
        return SimpleNamespace(logits=logits)


def test_the_teachers_own_replies_have_its_probabilities(network):
    _, tokenizer = network
    encode = prompt_encoder(tokenizer, raw=True)
    pairs = [(p, r) for p in TEACHER.prompts(6) for r in teacher_replies(TEACHER, p, 3, 0)]
    ids = [(encode(p), [*tokenizer(r)["input_ids"], tokenizer.eos_token_id]) for p, r in pairs]
    found = reply_logprobs(TheTeacherItself(tokenizer), ids)
    assert found == pytest.approx([TEACHER.log_probability(p, r) for p, r in pairs], abs=1e-5)


def test_log_probabilities_do_not_depend_on_the_batch_and_follow_temperature(network):
    model, _ = network
    pairs = [([5, 6, 7], [8, 9, 0]), ([5], [6, 0]), ([5, 6, 7, 8, 9], [7])]
    together = reply_logprobs(model, pairs)
    assert together == pytest.approx([reply_logprobs(model, [pair])[0] for pair in pairs], abs=1e-5)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0] / 0.5
    expected = sum(float(logits[place].log_softmax(-1)[token]) for place, token in ((2, 8), (3, 9), (4, 0)))
    assert reply_logprobs(model, pairs[:1], 0.5)[0] == pytest.approx(expected, abs=1e-5)


def test_a_random_student_is_far_in_both_directions(network):
    model, tokenizer = network
    found = gauge(model, tokenizer, TEACHER, TEACHER.prompts(20), prompt_encoder(tokenizer, raw=True), samples=4)
    assert len(found.validity) == 20
    assert np.mean(found.validity) < 0.2
    assert np.mean(found.forward) > 10
    assert np.mean(found.reverse) > 0  # the smoothed teacher is a distribution over all that the student can do
    assert found.unique_share > 0.9
    again = gauge(model, tokenizer, TEACHER, TEACHER.prompts(20), prompt_encoder(tokenizer, raw=True), samples=4)
    assert again == found


def made(valid: list[bool], length: int) -> Gauged:
    return Gauged(
        valid=[[flag] * 4 for flag in valid],
        lengths=[[length] * 4 for _ in valid],
        teacher_lengths=[[4] * 4 for _ in valid],
        forward=[],
        reverse=[],
        unique_share=1.0,
    )


def test_matched_validity_is_compared_in_pairs():
    better, worse = made([True] * 15 + [False] * 5, 4), made([True] * 5 + [False] * 15, 4)
    found = matched_difference(better, worse)
    assert found.value == pytest.approx(0.5)
    assert 0.2 < found.low < 0.5 < found.high < 0.8
    assert matched_difference(better, better)[:3] == (0.0, 0.0, 0.0)


def test_many_resamples_at_once_equal_the_slow_way():
    rng = np.random.default_rng(0)
    lengths, theirs = rng.integers(1, 12, (9, 30)), rng.integers(2, 10, (9, 30))
    side = Gauged(
        valid=(rng.random((9, 30)) < lengths / 12).tolist(),
        lengths=lengths.tolist(),
        teacher_lengths=theirs.tolist(),
        forward=[],
        reverse=[],
        unique_share=1.0,
    )
    assert _matched(side, np.ones((1, 9)))[0] == pytest.approx(side.matched().value)
    twice = _matched(side, 2 * np.ones((1, 9)), least=10)[0]
    assert twice == pytest.approx(side.matched().value)
