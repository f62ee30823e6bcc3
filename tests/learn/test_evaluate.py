from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.learn.evaluate import TokenStream, code_length, interval_text, stream_nll
from luthier.learn.objectives import CausalLoss
from luthier.learn.parallel import Ranks
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return CausalLoss(LlamaForCausalLM(config), plain_head=True)


def one_by_one(objective, tokens, context, stride):
    """The definition: each token from the last `context` (or, from the second window on, fewer) inputs before it."""
    inputs = [0, *tokens[:-1]]
    result = []
    for i in range(len(tokens)):
        window = 0 if i < context else math.ceil((i + 1 - context) / stride)
        seen = inputs[window * stride : i + 1]
        with torch.no_grad():
            logits = objective.model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        result.append(-float(torch.log_softmax(logits, -1)[tokens[i]]))
    return result


@pytest.mark.parametrize(
    ("n", "context", "stride"), [(1, 8, 4), (7, 8, 4), (8, 8, 8), (29, 8, 4), (30, 8, 8), (31, 8, 3)]
)
def test_every_token_is_charged_once_with_its_context(objective, n, context, stride):
    tokens = np.random.Generator(np.random.PCG64(n)).integers(0, 40, n)
    nats = stream_nll(objective, tokens, start_token=0, context=context, stride=stride, batch_size=3, who=Ranks())
    np.testing.assert_allclose(nats, one_by_one(objective, tokens.tolist(), context, stride), atol=1e-5)


def test_batch_size_does_not_matter(objective):
    tokens = np.random.Generator(np.random.PCG64(5)).integers(0, 40, 50)
    results = [
        stream_nll(objective, tokens, start_token=0, context=8, stride=4, batch_size=size, who=Ranks())
        for size in (1, 4, 64)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)


def test_scoring_leaves_the_training_mode_as_it_was(objective):
    objective.train()
    stream_nll(objective, np.arange(5), start_token=0, context=4, stride=4, batch_size=1, who=Ranks())
    assert objective.training
    objective.eval()
    stream_nll(objective, np.arange(5), start_token=0, context=4, stride=4, batch_size=1, who=Ranks())
    assert not objective.training


def test_bits_per_byte_by_hand():
    stream = TokenStream(tokens=np.arange(5), starts=np.array([0, 3]), num_bytes=np.array([4, 4]))
    score = code_length(stream, np.full(5, math.log(2)))
    assert score["bits_per_byte"] == pytest.approx(5 / 8)
    assert score["low"] == pytest.approx(2 / 4)  # both resampled documents are the short one
    assert score["high"] == pytest.approx(3 / 4)
    assert (score["documents"], score["bytes"], score["scored_tokens"]) == (2, 8, 5)


def test_one_document_has_no_interval():
    score = code_length(TokenStream(tokens=np.arange(3), starts=np.array([0]), num_bytes=np.array([6])), np.ones(3))
    assert "low" not in score
    assert interval_text(score) == "—"


def test_head_keeps_whole_documents_and_at_least_one():
    stream = TokenStream(tokens=np.arange(10), starts=np.array([0, 4, 7]), num_bytes=np.array([1, 2, 3]))
    assert [len(stream.head(limit).tokens) for limit in (1, 4, 6, 7, 9, 10, 99)] == [4, 4, 4, 7, 7, 10, 10]


def test_with_document_starts_a_document_costs_the_same_after_any_other():
    config = InstellaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    objective = CausalLoss(InstellaForCausalLM(config), plain_head=True)
    draw, ends = np.random.Generator(np.random.PCG64(7)), [0]  # every document ends with token 0

    def second_document(starts):
        first = np.concatenate([np.random.Generator(np.random.PCG64(len(ends))).integers(1, 40, 6), ends])
        ends.append(0)
        tokens = np.concatenate([first[:7], second])
        settings = {"start_token": 0, "context": 32, "stride": 16, "batch_size": 1, "who": Ranks()}
        return stream_nll(objective, tokens, **settings, document_starts=starts)[8:]  # its first token follows EOS

    second = draw.integers(1, 40, 9)
    masked = [second_document(np.array([0, 7])) for _ in range(2)]
    np.testing.assert_allclose(masked[0], masked[1], atol=1e-5)
    assert np.abs(second_document(None) - second_document(None)).max() > 1e-4
