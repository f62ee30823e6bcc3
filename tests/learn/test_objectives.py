from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from luthier.learn.objectives import (
    IGNORED,
    CausalLoss,
    cross_entropy_sum_reference,
    has_plain_head,
    is_causal,
    linear_cross_entropy,
    token_nll,
)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (37,), generator=generator)
    targets[[0, 5, 36]] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_chunked_loss_and_gradients_equal_the_reference(chunk):
    hidden, weight, targets = inputs()
    expected = cross_entropy_sum_reference(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, chunk)
    gradients = torch.autograd.grad(loss * 0.25, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_bf16_gradients_are_as_close_to_fp32_as_bf16_allows():
    hidden, weight, targets = inputs(torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 8), weight)
    exact = cross_entropy_sum_reference(hidden.float(), weight.float(), targets)
    (expected,) = torch.autograd.grad(exact, weight)
    assert (gradient.float() - expected.float()).norm() / expected.float().norm() < 0.01


def test_token_nll_sums_to_the_loss_and_ignores_what_is_ignored():
    hidden, weight, targets = inputs()
    each = token_nll(hidden, weight, targets, 8)
    assert each[[0, 5, 36]].tolist() == [0, 0, 0]
    torch.testing.assert_close(each.sum(), cross_entropy_sum_reference(hidden, weight, targets))


def small(kind, config_class, **extra):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return kind(config_class(**settings, **extra))


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        (small(LlamaForCausalLM, LlamaConfig), True),
        (small(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=0.5, pad_token_id=0), False),
    ],
)
def test_every_model_gets_its_own_loss(model, plain):
    """Soft-capped logits are no plain head: the probe sees that, and the loss is still the model's own."""
    assert has_plain_head(model) is plain
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, labels=ids).loss * (3 * 11)
    objective = CausalLoss(model, plain_head=plain)
    loss = objective(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    each = objective(ids[:, :-1], ids[:, 1:], per_token=True)
    assert each.shape == (3, 11)
    torch.testing.assert_close(each.sum(), loss, rtol=1e-5, atol=1e-4)


def test_dropout_does_not_hide_a_plain_head():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16)).train()
    assert has_plain_head(model)
    assert model.training


def test_an_encoder_is_not_causal():
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    assert is_causal(small(LlamaForCausalLM, LlamaConfig))
    assert is_causal(BertLMHeadModel(BertConfig(num_hidden_layers=1, is_decoder=True, **sizes)))
    assert not is_causal(BertLMHeadModel(BertConfig(num_hidden_layers=1, **sizes)))
