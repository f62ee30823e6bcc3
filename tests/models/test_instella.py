"""The model against itself: packed ≡ separate, padded ≡ unpadded, cached ≡ uncached, checkpointed ≡ plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier.models.instella as instella
from luthier.models.arithmetic import SIZES, tensor_shapes
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM, InstellaRMSNorm
from luthier.models.instella_config import InstellaConfig

VOCABULARY = 97
# torch's compiler, and transformers' use of it, import and call deprecated parts of torch.
TRACERS_OWN_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make_model(**settings: Any) -> InstellaForCausalLM:
    model = InstellaForCausalLM(InstellaConfig(vocab_size=VOCABULARY, **(SIZES["nano"] | settings)))
    initialize(model, seed=3)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def test_the_paper_model_has_399_tensors_of_the_right_shapes() -> None:
    with torch.device("meta"):
        model = InstellaForCausalLM(InstellaConfig())
    state = model.state_dict()
    assert sum(weight.numel() for weight in state.values()) == 3_112_675_840
    assert {name: tuple(weight.shape) for name, weight in state.items()} == tensor_shapes(model.config.dimensions)
    assert len(state) == 399


def test_rms_norm_casts_before_it_scales() -> None:
    norm = InstellaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    normalized = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), normalized.to(torch.bfloat16) * norm.weight)
    assert not torch.equal(norm(x), (normalized * norm.weight.float()).to(torch.bfloat16)), "the order is visible"


def test_frequencies_survive_casts_moves_and_to_empty() -> None:
    model = make_model()
    exact = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    model.to(torch.bfloat16)
    for rotary in (model.model.rotary_emb, model.to("meta").to_empty(device="cpu").model.rotary_emb):
        assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
        torch.testing.assert_close(rotary.inv_freq.double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(rotary.original_inv_freq, rotary.inv_freq)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_scaled_rope_runs_and_differs(rope: dict[str, Any]) -> None:
    tokens = random_tokens(1, 48)
    plain = make_model(max_position_embeddings=16)(tokens).logits
    scaled = make_model(max_position_embeddings=16, rope_parameters={**rope, "rope_theta": 10000.0})(tokens).logits
    assert torch.isfinite(scaled).all()
    assert (scaled - plain).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_kernels_agree(heads: int) -> None:
    model = make_model(num_key_value_heads=heads)
    tokens = random_tokens(2, 20)
    fast = model(tokens).logits
    model.set_attn_implementation("eager")
    slow = model(tokens, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(slow.logits, fast, atol=1e-5, rtol=0)
    assert slow.attentions[0].shape == (2, 4, 20, 20)
    assert len(slow.hidden_states) == 5


PACKED = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2 + [3] * 8, [7] * 12 + [4] * 12])


def separate_logits(model: InstellaForCausalLM, tokens: Tensor, document_ids: Tensor) -> Tensor:
    """Each document alone, at the positions that it has in its row."""
    logits = torch.zeros(*tokens.shape, VOCABULARY)
    for row in range(len(tokens)):
        for document in document_ids[row].unique():
            where = (document_ids[row] == document).nonzero()[:, 0]
            logits[row, where] = model(tokens[row, where][None], position_ids=where[None]).logits[0]
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@TRACERS_OWN_WARNINGS
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_packed_documents_equal_separate_documents(attention: str) -> None:
    model = make_model(num_key_value_heads=2)
    tokens = random_tokens(*PACKED.shape)
    expected = separate_logits(model, tokens, PACKED)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):  # compiled FlexAttention takes half a minute on a CPU
        packed = model(tokens, document_ids=PACKED).logits
        crossing = model(tokens).logits
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
    assert (crossing - expected).abs().max() > 1e-2, "without document ids attention crosses documents"


def test_packed_documents_with_padding_stay_finite() -> None:
    model = make_model().train()
    tokens, mask = random_tokens(*PACKED.shape), torch.ones_like(PACKED)
    mask[:, -4:] = 0
    logits = model(tokens, document_ids=PACKED, attention_mask=mask).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits[:, :-4], model(tokens, document_ids=PACKED).logits[:, :-4], atol=1e-5, rtol=0)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@torch.no_grad()
def test_positions_may_skip_inside_a_document() -> None:
    model, tokens = make_model().eval(), random_tokens(*PACKED.shape)
    skipping = torch.arange(PACKED.shape[1])[None] * 3
    stretched = model(tokens, document_ids=PACKED, position_ids=skipping).logits
    assert not torch.allclose(stretched, model(tokens, document_ids=PACKED).logits, atol=1e-3)
    moved = model(tokens, document_ids=PACKED, position_ids=skipping + 50).logits
    torch.testing.assert_close(stretched, moved, atol=1e-4, rtol=0)  # only distances count, and all are attended to
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    seen = model(changed, document_ids=PACKED, position_ids=skipping).logits - stretched
    same = PACKED[:, :1] == PACKED
    assert (seen.abs().amax(-1) > 0)[same].all()


def test_document_ids_are_refused_where_they_would_be_ignored() -> None:
    model = make_model()
    tokens = random_tokens(2, 24)
    cache = model(tokens, use_cache=True).cache
    with pytest.raises(ValueError, match="cannot be combined"):
        model(tokens, document_ids=PACKED, cache=cache)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="document_ids needs one of"):
        model(tokens, document_ids=PACKED)


def test_an_unpadded_batch_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    attend = instella.InstellaAttention.forward
    monkeypatch.setattr(
        instella.InstellaAttention,
        "forward",
        lambda self, x, **kwargs: masks.append(kwargs["attention_mask"]) or attend(self, x, **kwargs),
    )
    model = make_model()
    tokens = random_tokens(2, 10)
    model.train()(tokens)
    model.eval()(tokens)
    model(tokens, attention_mask=torch.ones_like(tokens))
    assert masks == [None] * 12
    model(tokens, document_ids=torch.zeros_like(tokens))
    assert masks[-1].shape == (2, 1, 10, 10)


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_left_padded_cached_generation_equals_one_by_one_uncached(heads: int) -> None:
    model = make_model(num_key_value_heads=heads, eos_token_id=None)
    prompts = [random_tokens(length, seed=length) for length in (3, 11, 7)]
    width = max(len(prompt) for prompt in prompts)
    batch = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0), value=1) for prompt in prompts])
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    mask = (torch.arange(width) >= width - lengths).long()
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=16, do_sample=False)[:, width:]
    for row, prompt in enumerate(prompts):
        sequence = prompt[None]
        for _ in range(16):
            following = model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat((sequence, following), dim=1)
        assert torch.equal(generated[row], sequence[0, len(prompt) :]), row


def test_loss_is_the_mean_over_targets() -> None:
    model = make_model().train()
    tokens = random_tokens(2, 12)
    labels = tokens.clone()
    labels[0, :6] = -100
    output = model(tokens, labels=labels)
    log_probabilities = output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -log_probabilities[counted].mean())
    assert output.cache is None, "training makes no cache"


def test_logits_to_keep() -> None:
    model = make_model()
    tokens = random_tokens(2, 12)
    everything = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([2, 5])).logits, everything[:, [2, 5]])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, everything)
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    tokens = random_tokens(2, 16)
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, document_ids=(tokens > 40).long().cumsum(1)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@TRACERS_OWN_WARNINGS
def test_one_graph_without_breaks_or_needless_masks() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = make_model().train()
    tokens = random_tokens(2, 24)
    traced = torch.compile(model, fullgraph=True, backend=record)
    torch.testing.assert_close(traced(tokens).logits, model(tokens).logits)
    attention = [node for node in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert [(node.kwargs["attn_mask"], node.kwargs["is_causal"]) for node in attention] == [(None, True)] * 4

    packed = model(tokens, document_ids=PACKED).logits
    torch.testing.assert_close(traced(tokens, document_ids=PACKED).logits, packed)


def test_tied_embeddings_share_one_tensor() -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shapes = tensor_shapes(model.config.dimensions)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        torch.Size(shape).numel() for shape in shapes.values()
    )
