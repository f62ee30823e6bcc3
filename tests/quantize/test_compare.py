from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.quantize import compare as module
from luthier.quantize.compare import Comparison, compare, cut, squared_errors, token_scores
from luthier.quantize.speed import measure_speed

VOCABULARY = 53


def llama(seed: int, **settings: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, **settings})
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def a() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture(scope="module")
def b(a: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with noise on its weights."""
    model = llama(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    return model


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    draw = np.random.Generator(np.random.PCG64(0))
    return [draw.integers(0, VOCABULARY, size=n).tolist() for n in (30, 2, 17, 41, 9)]


def test_a_model_does_not_differ_from_itself(a: LlamaForCausalLM, documents: list[list[int]]) -> None:
    found = compare(a, a, documents, context=16)
    assert (found.kl.value, found.kl.low, found.kl.high, found.quantile(100)) == (0, 0, 0, 0)
    assert found.agreement.value == 1
    assert found.loss_difference.value == 0
    assert found.layer_errors == (0, 0, 0)
    assert found.tokens == sum(len(ids) - 1 for ids in documents)
    assert found.documents == len(documents)


@torch.no_grad()
def slowly(a: PreTrainedModel, b: PreTrainedModel, documents: list[list[int]]) -> dict[str, Any]:
    """The definitions, one document and one token at a time, in windows that hold a whole document."""
    kl, agree, difference = [], [], []
    squares = np.zeros((2, a.config.num_hidden_layers))
    for ids in documents:
        inputs = torch.tensor([ids[:-1]])
        out_a, out_b = (model(inputs, output_hidden_states=True) for model in (a, b))
        for i, target in enumerate(ids[1:]):
            p, q = (out.logits[0, i].double().softmax(-1) for out in (out_a, out_b))
            kl.append(sum(float(p[v]) * math.log(float(p[v]) / float(q[v])) for v in range(VOCABULARY)))
            agree.append(int(p.argmax() == q.argmax()))
            difference.append(math.log(float(p[target])) - math.log(float(q[target])))
        for layer, (x, y) in enumerate(zip(out_a.hidden_states[1:], out_b.hidden_states[1:], strict=True)):
            squares[:, layer] += float((x - y).square().sum()), float(x.square().sum())
    return {"kl": kl, "agree": agree, "difference": difference, "layers": np.sqrt(squares[0] / squares[1])}


def test_all_numbers_are_those_of_the_definitions(
    a: LlamaForCausalLM, b: LlamaForCausalLM, documents: list[list[int]]
) -> None:
    found, slow = compare(a, b, documents, context=64, batch_size=3), slowly(a, b, documents)
    assert found.kl.value == pytest.approx(np.mean(slow["kl"]), rel=1e-5)
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.quantile(50) == pytest.approx(np.median(slow["kl"]), rel=1e-4)
    assert found.quantile(99) == pytest.approx(np.quantile(slow["kl"], 0.99), rel=1e-4)
    assert found.agreement.value == pytest.approx(np.mean(slow["agree"]))
    assert found.loss_difference.value == pytest.approx(np.mean(slow["difference"]), abs=1e-6)
    assert found.layer_errors == pytest.approx(slow["layers"], rel=1e-4)
    ratio = found.perplexities[1] / found.perplexities[0]
    assert math.log(ratio) == pytest.approx(found.loss_difference.value, abs=1e-9)


def same(found: Comparison, other: Comparison) -> None:
    assert found.kl == pytest.approx(other.kl, rel=1e-4)
    assert found.agreement == pytest.approx(other.agreement)
    assert found.loss_b == pytest.approx(other.loss_b, rel=1e-5)
    assert found.layer_errors == pytest.approx(other.layer_errors, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_matter(
    a: LlamaForCausalLM, b: LlamaForCausalLM, documents: list[list[int]], batch_size: int
) -> None:
    same(compare(a, b, documents, context=16, batch_size=batch_size), compare(a, b, documents, context=16))


def test_neither_does_the_room_for_logits_and_hidden_states(
    a: LlamaForCausalLM, b: LlamaForCausalLM, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(a, b, documents, context=16)
    monkeypatch.setattr(module, "CHUNK", 3 * VOCABULARY)
    monkeypatch.setattr(module, "HIDDEN", 1)
    same(compare(a, b, documents, context=16), whole)


def test_the_order_of_documents_does_not_matter(
    a: LlamaForCausalLM, b: LlamaForCausalLM, documents: list[list[int]]
) -> None:
    found, other = (compare(a, b, given, context=16) for given in (documents, documents[::-1]))
    assert found.kl.value == pytest.approx(other.kl.value, rel=1e-5)


def test_a_head_that_is_not_plain_is_used_as_it_is(
    a: LlamaForCausalLM, b: LlamaForCausalLM, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compare(a, b, documents, context=16)
    monkeypatch.setattr(module, "has_plain_head", lambda model: False)
    same(compare(a, b, documents, context=16), plain)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_is_a_target_once(lengths: list[int], context: int) -> None:
    documents = [list(range(100 * d, 100 * d + n)) for d, n in enumerate(lengths)]
    windows = list(cut(documents, context))
    assert [int(t) for w in windows for t in w.targets] == [t for ids in documents for t in ids[1:]]
    for window in windows:
        assert len(window.inputs) <= context
        assert (window.targets - window.inputs == 1).all()


def test_a_forbidden_token_costs_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, 1.0]])
    scores = token_scores(logits, logits, torch.tensor([0, 1]))
    assert scores.kl.tolist() == [0, 0]
    assert scores.agree.tolist() == [1, 1]


def test_squared_errors_leave_padding_out() -> None:
    x, counted = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    y = torch.where(counted[..., None], x, 100.0) * 1.5
    assert squared_errors([x], [y], counted).tolist() == [[3 * 4 * 0.25, 3 * 4]]


def test_models_of_other_shapes_have_no_layer_errors(a: LlamaForCausalLM, documents: list[list[int]]) -> None:
    found = compare(a, llama(2, num_hidden_layers=2), documents, context=16)
    assert found.layer_errors == ()
    assert found.kl.value > 0


def test_other_vocabularies_are_refused(a: LlamaForCausalLM, documents: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="vocabularies of 53 and 60 tokens"):
        compare(a, llama(0, vocab_size=60), documents, context=16)


def test_text_without_a_target_is_refused(a: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="no token to score"):
        compare(a, a, [[3], []], context=16)


def test_a_model_that_overflows_is_named(a: LlamaForCausalLM, documents: list[list[int]]) -> None:
    broken = llama(0)
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = math.nan
    with pytest.raises(CheckpointError, match="logits are not finite"):
        compare(a, broken, documents, context=16)


def test_speed_is_measured_for_each_model(a: LlamaForCausalLM, b: LlamaForCausalLM) -> None:
    rounds: list[int] = []
    found = measure_speed({"a": a, "b": b}, prompt_tokens=8, new_tokens=2, repeats=2, advance=rounds.append)
    assert list(found) == ["a", "b"]
    assert sum(rounds) == 3
    assert all(0 < s.decode.low <= s.decode.value <= s.decode.high for s in found.values())
    assert all(s.prefill.n == 2 for s in found.values())
