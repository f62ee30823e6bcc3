"""No total without the code's cost; and no code length, honestly counted, lies below the truth.

The bound is tested on a source whose entropy is known: a hidden class per segment, which a code could tell. Three ways
of cheating, each seen in practice, must be caught: a code that is not charged, tokens that are not, and a decoder that
is given the encoder's numbers before they are rounded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.config import build
from luthier.core.console import Console
from luthier.data.known_sources import KnownSample, Latent
from luthier.entropy.code_length import CodeLength, Measured, Segments, check_bound, cut, measure, rows_as_documents
from luthier.entropy.config import TrainEemConfig
from luthier.entropy.network import EntropyModel
from luthier.entropy.training import build_model, train_eem
from luthier.learn.evaluate import TokenStream
from luthier.learn.parallel import Ranks

LENGTH = 16
SOURCE = Latent(vocab_size=8, classes=8, concentration=0.2)
SMALL = {
    "window": LENGTH,
    "encoder_width": 32,
    "decoder_width": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "heads": 2,
    "batch_size": 32,
    "micro_batch_size": 32,
    "steps": 200,
    "learning_rate": 5e-3,
    "warmup_steps": 20,
    "null_share": 0.3,
    "eval_every": 0,
    "checkpoint_every": 1000,
    "device": "cpu",
    "precision": "fp32",
}


class Fresh:
    """New segments of the source at every step."""

    def batch(self, step: int) -> dict[str, NDArray[np.int64]]:
        return {"input_ids": SOURCE.sample(32, LENGTH, step).tokens}

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: object) -> None:
        pass


@pytest.fixture(scope="module")
def sample() -> KnownSample:
    """Segments that no model here was trained on."""
    return SOURCE.sample(1000, LENGTH, 10**6)


def train_one(sample: KnownSample, folder, **settings: object) -> tuple[EntropyModel, Measured]:
    config = build(TrainEemConfig, {**SMALL, **settings})
    outcome = train_eem(
        config,
        build_model(config, SOURCE.vocab_size),
        Fresh(),
        rows_as_documents(sample.tokens),
        who=Ranks(),
        checkpoints=folder,
        run=None,
        console=Console(err=io.StringIO()),
    )
    assert outcome.held_out is not None
    return outcome.model, outcome.held_out


@pytest.fixture(scope="module")
def rounded(sample: KnownSample, tmp_path_factory: pytest.TempPathFactory) -> tuple[EntropyModel, Measured]:
    """A model with a code of three bits."""
    return train_one(sample, tmp_path_factory.mktemp("rounded"), dims=1, levels=8)


@pytest.fixture(scope="module")
def noisy(sample: KnownSample, tmp_path_factory: pytest.TempPathFactory) -> tuple[EntropyModel, Measured]:
    """A model trained as published, with a little noise, whose code of two levels holds next to nothing of it."""
    return train_one(sample, tmp_path_factory.mktemp("noisy"), dims=2, levels=2, quantizer="noise", noise_width=1 / 64)


Accounting = Callable[[EntropyModel, Tensor], NDArray[np.float64]]


def honest(model: EntropyModel, ids: Tensor) -> NDArray[np.float64]:
    """Charged nats (S,) of each segment."""
    return measure(model, rows_as_documents(ids.numpy())).code.bits * math.log(2)


def code_not_charged(model: EntropyModel, ids: Tensor) -> NDArray[np.float64]:
    return honest(model, ids) - model.code_bits * math.log(2)


@torch.no_grad()
def half_of_the_tokens(model: EntropyModel, ids: Tensor) -> NDArray[np.float64]:
    nats = model.nats(ids, model.encode(ids))[:, : LENGTH // 2].double().sum(1).numpy()
    return nats + model.code_bits * math.log(2)


@torch.no_grad()
def not_rounded(model: EntropyModel, ids: Tensor) -> NDArray[np.float64]:
    """The code is charged, but the decoder sees the encoder's numbers: only private functions make that possible."""
    logits = model.lm_head(model._hidden(ids, model._numbers(ids, None), None))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return nats.view(ids.shape).double().sum(1).numpy() + model.code_bits * math.log(2)


def bound_holds(accounting: Accounting, model: EntropyModel, sample: KnownSample) -> bool:
    """The check: charged lengths against -ln p of the same segments under the source."""
    return check_bound(accounting(model, torch.as_tensor(sample.tokens)), sample.surprisal.sum(1)).holds


def test_no_honest_code_length_lies_below_the_truth(rounded, noisy, sample: KnownSample) -> None:
    truth = sample.surprisal.sum(1)
    for model, measured in (rounded, noisy):
        assert bound_holds(honest, model, sample)
        for length in (measured.null, measured.code, measured.cheaper):
            assert check_bound(length.bits * math.log(2), truth).holds
        # And the model is good enough for the check to bite: within 0.05 nats a token of what is possible.
        assert check_bound(measured.null.bits * math.log(2), truth).excess < 0.05 * LENGTH


def test_a_code_that_is_not_charged_is_caught(rounded, sample: KnownSample) -> None:
    assert not bound_holds(code_not_charged, rounded[0], sample)


def test_tokens_that_are_not_charged_are_caught(rounded, sample: KnownSample) -> None:
    assert not bound_holds(half_of_the_tokens, rounded[0], sample)


def test_a_decoder_that_sees_more_than_the_code_is_caught(noisy, sample: KnownSample) -> None:
    assert not bound_holds(not_rounded, noisy[0], sample)


def test_the_loss_falls_below_the_entropy_while_the_code_length_rises(rounded, sample: KnownSample) -> None:
    """Why a decoder's loss is no entropy: with a code it is below the truth, and with the code's cost above no code."""
    null, code, truth = rounded[1].null, rounded[1].code, float(sample.surprisal.sum())
    assert code.token_nats.sum() < truth < null.bits.sum() * math.log(2) < code.bits.sum() * math.log(2)


@torch.no_grad()
def test_nothing_leaks_but_through_the_code(rounded, sample: KnownSample) -> None:
    """With one and the same vector for all segments the decoder is a causal model, and cannot beat the truth."""
    model, ids = rounded[0], torch.as_tensor(sample.tokens)
    mean = torch.tanh(model._numbers(ids, None)).mean(0, keepdim=True).expand(len(ids), -1)
    logits = model.lm_head(model._hidden(ids, mean, None))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    assert check_bound(nats.double().sum(1).numpy(), sample.surprisal.sum(1)).excess > 0


class Fake:
    """Each token costs as many nats as its id without a code, half of that with one; a code costs 3 bits."""

    code_bits = 3.0

    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return torch.zeros(len(ids), 1, dtype=torch.long)

    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        nats = ids.float() * (1.0 if code is None else 0.5)
        return nats if mask is None else nats * mask


STREAM = TokenStream(tokens=np.array([1, 1, 1, 1, 1, 9, 9, 9]), starts=np.array([0, 5]), num_bytes=np.array([10, 4]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_every_token_code_and_flag_is_counted_once(side: str, batch_size: int) -> None:
    """Segments: [1 1 1 1], [1] of the first document, [9 9 9] of the second; only the last one's code pays."""
    null, code, cheaper, coded = measure(Fake(), cut(STREAM, 4), batch_size=batch_size, padding_side=side)
    assert null.token_nats.tolist() == [5, 27]
    assert code.token_nats.tolist() == [2.5, 13.5]
    assert null.bits.tolist() == pytest.approx([5 / math.log(2), 27 / math.log(2)])
    assert code.bits.tolist() == pytest.approx([2.5 / math.log(2) + 6, 13.5 / math.log(2) + 3])
    assert cheaper.bits.tolist() == pytest.approx([5 / math.log(2) + 2, 13.5 / math.log(2) + 3 + 1])
    assert coded == pytest.approx(1 / 3)
    assert null.num_tokens.tolist() == [5, 3]
    assert cheaper.bits_per_byte.value == pytest.approx(cheaper.bits.sum() / 14)
    assert sum(cheaper.shares.values()) == pytest.approx(cheaper.bits_per_byte.value)
    assert cheaper.row()["bytes"] == 14


def test_the_head_of_segments_are_whole_documents() -> None:
    segments = cut(STREAM, 4)
    assert [len(segments.head(n).ids) for n in (1, 2, 3, 9)] == [2, 2, 3, 3]
    assert segments.head(2).num_bytes.tolist() == [10]


def test_there_is_no_code_length_without_its_parts() -> None:
    whole = measure(Fake(), cut(STREAM, 4)).code
    with pytest.raises(TypeError, match="code_bits"):
        CodeLength(  # type: ignore[call-arg]
            token_nats=whole.token_nats,
            header_bits=whole.header_bits,
            num_tokens=whole.num_tokens,
            num_bytes=whole.num_bytes,
        )
    with pytest.raises(ValueError, match="five equal, non-empty rows"):
        replace(whole, code_bits=np.zeros(1))
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="infinite or negative"):
            replace(whole, code_bits=np.full(2, wrong))
    totals = [name for name in vars(CodeLength) if isinstance(getattr(CodeLength, name), property)]
    assert sorted(totals) == ["bits", "bits_per_byte", "nats_per_token", "shares"]
    more = replace(whole, code_bits=whole.code_bits + 1)
    assert (more.bits > whole.bits).all()
    assert more.nats_per_token > whole.nats_per_token
    assert more.bits_per_byte.value > whole.bits_per_byte.value


def test_rows_as_documents_are_one_segment_each() -> None:
    segments = rows_as_documents(np.zeros((3, 5), np.int64))
    assert isinstance(segments, Segments)
    assert segments.documents.tolist() == [0, 1, 2]
    assert segments.num_bytes.tolist() == segments.lengths.tolist() == [5, 5, 5]
