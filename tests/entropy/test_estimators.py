"""Estimates of single tokens: they sum to what they say they sum to, and say what they are not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.known_sources import Latent
from luthier.entropy.config import EemConfig
from luthier.entropy.estimators import (
    ESTIMATORS,
    PREDICTIVE_ENTROPY,
    UPPER_BOUND,
    CausalScorer,
    allocate,
    allocation,
    describe,
    min_max,
    move_nats,
    occlusion,
    predictive_entropy,
    surprisal,
    window,
    window_differences,
)
from luthier.entropy.network import EntropyModel
from luthier.entropy.network_config import EntropyConfig

VOCAB, LENGTH = 23, 12


class ClassModel:
    """The perfect model of a `Latent` source: its code is the class, its null mode the mixture over classes."""

    def __init__(self, source: Latent) -> None:
        self.emission = torch.tensor(source.parameters[2])
        self.code_bits = math.log2(source.classes)

    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        return -torch.log_softmax(self.logits(ids, code), -1).gather(2, ids[..., None])[..., 0]

    def logits(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        if code is not None:
            return self.emission[code[:, 0]].log()[:, None].expand(-1, ids.shape[1], -1)
        seen = self.emission.log()[:, ids].movedim(0, -1).cumsum(1)
        belief = torch.cat((torch.zeros_like(seen[:, :1]), seen[:, :-1]), 1).softmax(-1)
        return (belief @ self.emission).log()

    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.emission.log()[:, ids].sum(-1).argmax(0)[:, None]


def eem(**settings: object) -> EntropyModel:
    """Random weights, large enough that the code matters to every token."""
    torch.manual_seed(0)
    values = {"vocab_size": VOCAB, "window": LENGTH, "encoder_width": 16, "decoder_width": 16, "heads": 2}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "dims": 3, "levels": 4}
    model = EntropyModel(EntropyConfig.of(EemConfig(**{**values, **sizes, **settings}))).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return model


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def causal() -> CausalScorer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CausalScorer(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval(), start_token=5)


MODELS = {
    "transformer": {},
    "padded on the left": {"padding_side": "left"},
    "added": {"intro": "added"},
    "mixer": {"half": "mixer", "intro": "embedding"},
}


@pytest.mark.parametrize("name", MODELS)
def test_window_differences_sum_to_the_raw_decoder_loss(name: str) -> None:
    model, ids = eem(**MODELS[name]), tokens()
    side = model.eem.padding_side
    found = window_differences(model, ids, padding_side=side, batch_size=5)
    raw = model.nats(ids, model.encode(ids)).double().sum(1)
    torch.testing.assert_close(found.differences.sum(1), raw, atol=1e-4, rtol=0)
    assert found.deficit_bits == model.code_bits == 6
    assert found.negatives == int((window(model, ids) < 0).sum())


@pytest.mark.parametrize("name", MODELS)
def test_window_differences_are_those_of_windows_one_by_one(name: str) -> None:
    model, ids = eem(**MODELS[name]), tokens()
    expected = [torch.zeros(len(ids), dtype=torch.float64)]
    for end in range(1, LENGTH + 1):
        expected.append(model.nats(ids[:, :end], model.encode(ids[:, :end])).double().sum(1))
    for batch_size in (1, 7, 100):
        found = window_differences(model, ids, batch_size=batch_size, padding_side=model.eem.padding_side)
        torch.testing.assert_close(found.totals, torch.stack(expected, 1), atol=1e-4, rtol=0)


def test_strides_and_last_tokens_are_sums_of_single_differences() -> None:
    model, ids = eem(), tokens()
    single = window_differences(model, ids).differences
    coarse = window_differences(model, ids, last=7, stride=3)
    assert coarse.ends.tolist() == [5, 6, 9, 12]
    expected = torch.stack([single[:, 5:6].sum(1), single[:, 6:9].sum(1), single[:, 9:].sum(1)], 1)
    torch.testing.assert_close(coarse.differences, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="last and stride: got 13 and 1"):
        window_differences(model, ids, last=13)


def test_without_codes_window_differences_are_the_surprisals(causal: CausalScorer) -> None:
    ids = tokens()
    torch.testing.assert_close(window(causal, ids), surprisal(causal, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_accounted_allocation_sums_to_the_whole_code_length(name: str) -> None:
    model, ids = eem(**MODELS[name]), tokens()
    found = allocation(model, ids)
    total = model.nats(ids, model.encode(ids)).sum(1) + model.code_bits * math.log(2)
    torch.testing.assert_close(found.sum(1), total, atol=1e-4, rtol=0)
    assert found.min() >= 0


nats_rows = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.booleans()), min_size=1, max_size=9)


@given(nats_rows, st.floats(0, 500))
def test_an_allocation_is_complete_and_never_negative(rows: list[tuple[float, float, bool]], code_nats: float) -> None:
    rows = [*rows, (1.0, 1.0, True)]
    with_code, null = (torch.tensor([[row[i] for row in rows]], dtype=torch.float64) for i in (0, 1))
    mask = torch.tensor([[row[2] for row in rows]])
    found = allocate(with_code, null, code_nats, mask=mask)
    assert found.sum().item() == pytest.approx((with_code * mask).sum().item() + code_nats)
    assert (found >= 0).all()
    assert (found[~mask] == 0).all()
    extra = found - with_code * mask
    if ((null > with_code) & mask).any():
        assert (extra[mask & (null <= with_code)] == 0).all()  # tokens that the code did not help pay nothing


def test_raw_loss_falls_below_the_truth_and_the_charged_one_does_not() -> None:
    """The one demonstration to remember (specification of the source: a hidden class per segment)."""
    source = Latent(classes=16, concentration=2.0)
    sample = source.sample(300, 48, seed=3)
    model, ids, truth = ClassModel(source), torch.tensor(sample.tokens), torch.tensor(sample.surprisal.sum(1))
    raw = model.nats(ids, model.encode(ids)).sum(1)
    assert (raw < truth).float().mean() > 0.99
    charged = allocation(model, ids).sum(1)
    assert (charged >= truth - 1e-9).all()  # a two-part code never beats the mixture, on any text
    assert (charged - truth).mean() > 0.01
    torch.testing.assert_close(surprisal(model, ids).sum(1), truth)  # in the null mode this model is the truth
    np.testing.assert_allclose(predictive_entropy(model.logits(ids, None)), sample.entropy, atol=1e-5)


def test_half_the_charge_would_fall_below_the_truth() -> None:
    """The test above can fail: forgetting half of the code's cost shows."""
    source = Latent(classes=16, concentration=2.0)
    sample = source.sample(300, 48, seed=3)
    model, ids = ClassModel(source), torch.tensor(sample.tokens)
    given_code, null = (model.nats(ids, code) for code in (model.encode(ids), None))
    halved = allocate(given_code, null, 0.5 * model.code_bits * math.log(2)).sum(1)
    assert (halved.mean() - sample.surprisal.sum(1).mean()).item() < 0


def test_padding_is_left_out_of_everything() -> None:
    model, ids = eem(), tokens()
    mask = torch.arange(LENGTH)[None].expand(3, -1) < torch.tensor([[12], [7], [1]])
    for name in ("surprisal", "allocation", "occlusion"):
        found = ESTIMATORS[name].estimate(model, ids, mask=mask)
        assert (found[~mask] == 0).all()
        alone = ESTIMATORS[name].estimate(model, ids[1:2, :7])
        torch.testing.assert_close(found[1:2, :7], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="whole segments"):
        window(model, ids, mask=mask)


def test_surprisal_is_the_causal_models_loss_with_the_first_token_charged(causal: CausalScorer) -> None:
    ids = tokens()
    seen = torch.cat((torch.full((3, 1), 5), ids[:, :-1]), 1)
    log_p = torch.log_softmax(causal.model(input_ids=seen).logits.double(), -1)
    torch.testing.assert_close(
        surprisal(causal, ids).double(), -log_p.gather(2, ids[..., None])[..., 0], atol=1e-5, rtol=1e-5
    )
    for call in (lambda: causal.encode(ids), lambda: causal.nats(ids, ids[:, :1])):
        with pytest.raises(ValueError, match=r"null mode|takes none"):
            call()


def test_predictive_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf], [math.log(3), 0, -90, -90]])
    expected = [math.log(4), 0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    torch.testing.assert_close(predictive_entropy(logits), torch.tensor(expected), atol=1e-6, rtol=0)


def test_occlusion_is_zero_for_a_code_that_does_nothing() -> None:
    model, ids = eem(intro="added"), tokens()
    for distance in ("l1", "cosine", "loss"):
        moved = occlusion(model, ids, distance=distance)  # type: ignore[arg-type]
        assert (moved > 0).float().mean() > 0.9
    scaled = occlusion(model, ids, normalized=True)
    assert scaled.amin(1).tolist() == [0, 0, 0]
    assert scaled.amax(1).tolist() == [1, 1, 1]
    with torch.no_grad():
        model.widen.weight.zero_()
    assert occlusion(model, ids).abs().max() == 0


def test_min_max_of_equal_values_is_zero() -> None:
    assert min_max(torch.full((1, 3), 7.0)).tolist() == [[0, 0, 0]]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 30)), min_size=1, max_size=12), st.data())
def test_nats_moved_to_another_tokenizer_keep_their_sum(rows: list[tuple[int, float]], data: st.DataObject) -> None:
    sizes, nats = np.array([size for size, _ in rows]), np.array([value for _, value in rows])
    cuts = data.draw(st.sets(st.integers(1, max(1, int(sizes.sum()) - 1)), max_size=12))
    edges = sorted({0, int(sizes.sum()), *(cut for cut in cuts if cut < sizes.sum())})
    wanted = np.diff(edges)
    moved = move_nats(nats, sizes, wanted)
    assert moved.sum() == pytest.approx(nats.sum())
    per_byte = np.repeat(nats / sizes, sizes)  # the definition
    expected = [per_byte[a:b].sum() for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(moved, expected, atol=1e-9)
    with pytest.raises(ValueError, match="the same text"):
        move_nats(nats, sizes, np.append(wanted, 1))


def test_details_are_those_of_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 0.0]])
    found = describe(logits, torch.tensor([2, 0]), top=2)
    assert found.rank.tolist() == [2, 2]  # of two equals, the other counts as better
    assert found.top[0].tolist() == [1, 2]
    torch.testing.assert_close(found.top_p, logits.softmax(-1).gather(1, found.top))
    torch.testing.assert_close(found.nats, -logits.log_softmax(-1)[[0, 1], [2, 0]])
    assert describe(logits, torch.tensor([0, 0]), top=5).top.shape == (2, 3)


def test_the_wording_says_what_each_number_is_not() -> None:
    for estimator in ESTIMATORS.values():
        assert "per-token entropy" not in " ".join(estimator.label)
        assert "not" in estimator.label.is_not
    assert next(iter(ESTIMATORS)) == "surprisal"
    assert ESTIMATORS["surprisal"].label.name == "surprisal estimate"
    assert "uncharged" in ESTIMATORS["window"].label.name
    assert "may be negative" in ESTIMATORS["window"].label.name
    assert "no bound" in ESTIMATORS["window"].label.is_not
    assert PREDICTIVE_ENTROPY.name == "predictive entropy"
    assert "not the source's entropy" in PREDICTIVE_ENTROPY.is_not
    assert UPPER_BOUND.startswith("Upper bound in expectation")
    for condition in ("code of each segment", "as quantized", "lossless", "training data", "the end", "own bytes"):
        assert condition in UPPER_BOUND
