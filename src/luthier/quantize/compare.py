"""How far one causal language model is from another: divergence, agreement, perplexity, hidden states.

Divergence tells more than perplexity: a damaged model can assign the right tokens the same probability on average.
Every number is measured on the same windows of tokens for both models, in fp64, over the whole vocabulary. Documents
are the unit of all intervals, because the tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from luthier.core.errors import CheckpointError, ConfigError, DataError
from luthier.core.stats import Interval, bootstrap_ratio
from luthier.learn.objectives import IGNORED, has_plain_head

CHUNK = 2**22  # logits that are compared at once: 32 MB in fp64, a few times over
HIDDEN = 2**27  # hidden states that a batch may keep, over all layers of one model
QUANTILES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.9, 100)
RESAMPLES = 2000


class TokenScores(NamedTuple):
    """For each token (N,) fp64: KL(A‖B) in nats, whether both rank the same token first, and nats of the true token."""

    kl: Tensor
    agree: Tensor
    nats_a: Tensor
    nats_b: Tensor


class Window(NamedTuple):
    """Input ids (T,) of one document and what follows each of them (T,)."""

    document: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` measured. All nats are per token; intervals are 95 % over documents.

    kl_quantiles: (percent, nats) of the divergence over tokens. loss_difference: that of B minus that of A.
    layer_errors: ‖h_A − h_B‖ / ‖h_A‖ of the hidden states after each decoder layer (the last one after the final norm),
    over all tokens; empty where the models have different shapes. document_kl: the divergence summed over the tokens of
    each document, of which there are document_tokens: what another comparison on the same text can be paired with.
    """

    kl: Interval
    kl_quantiles: tuple[tuple[float, float], ...]
    agreement: Interval
    loss_a: Interval
    loss_b: Interval
    loss_difference: Interval
    layer_errors: tuple[float, ...]
    document_kl: tuple[float, ...]
    document_tokens: tuple[int, ...]
    tokens: int
    documents: int

    def quantile(self, percent: float) -> float:
        """The divergence (nats) that so many percent of the tokens do not exceed; one of QUANTILES."""
        return dict(self.kl_quantiles)[percent]

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of A and B, per token."""
        return math.exp(self.loss_a.value), math.exp(self.loss_b.value)


def token_scores(logits_a: Tensor, logits_b: Tensor, targets: Tensor) -> TokenScores:
    """Compare logits (N, V) of two models for the tokens targets (N,)."""
    log_a, log_b = logits_a.double().log_softmax(-1), logits_b.double().log_softmax(-1)
    p = log_a.exp()
    terms = torch.where(p > 0, p * (log_a - log_b), 0.0)  # a logit of minus infinity contributes nothing
    agree = log_a.argmax(-1) == log_b.argmax(-1)
    at = targets[:, None]
    return TokenScores(terms.sum(-1), agree.double(), -log_a.gather(1, at)[:, 0], -log_b.gather(1, at)[:, 0])


def squared_errors(hidden_a: Sequence[Tensor], hidden_b: Sequence[Tensor], counted: Tensor) -> Tensor:
    """(layers, 2) fp64: ‖h_A − h_B‖² and ‖h_A‖² of hidden states (B, T, D) at the counted (B, T) positions."""
    sums = []
    for a, b in zip(hidden_a, hidden_b, strict=True):
        x, y = a[counted].float(), b[counted].float()
        sums.append(torch.stack([(x - y).double().square().sum(), x.double().square().sum()]))
    return torch.stack(sums)


@torch.no_grad()
def compare(
    a: PreTrainedModel,
    b: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Comparison:
    """Measure how B differs from A on documents of token ids, whose first one is given and not scored.

    A document longer than `context` is cut into windows of so many tokens, which do not see each other. The batch size
    changes nothing but speed. `advance` is told how many tokens are done.

    Raises: ConfigError for models with different vocabularies, DataError for documents without a token to score,
    CheckpointError for logits that are not finite.
    """
    _check_vocabularies(a, b)
    windows = sorted(cut(documents, context), key=lambda window: len(window.inputs), reverse=True)
    if not windows:
        raise DataError("the text has no token to score", hint="give more text")
    readers = _Reader(a), _Reader(b)
    with_layers = _shape(a) == _shape(b)
    owners, scores, layers = list[NDArray[np.int64]](), list[TokenScores](), torch.zeros(())
    for batch in _batches(windows, batch_size, a.config):
        ids = _padded([window.inputs for window in batch]).to(a.device)
        targets = _padded([window.targets for window in batch]).to(a.device)
        counted = targets != IGNORED
        reads = [reader.read(ids.clamp(min=0)) for reader in readers]
        if with_layers:
            layers = layers + squared_errors(reads[0].layers, reads[1].layers, counted).cpu()
        scores += _score(readers, [read.states[counted] for read in reads], targets[counted])
        owners.append(np.repeat([window.document for window in batch], [len(window.targets) for window in batch]))
        advance(len(owners[-1]))
    columns = TokenScores(*(torch.cat(column).cpu() for column in zip(*scores, strict=True)))
    errors = (layers[:, 0] / layers[:, 1]).sqrt().tolist() if with_layers else []
    return _summarize(np.concatenate(owners), columns, tuple(errors))


def cut(documents: Sequence[Sequence[int]], context: int) -> Iterator[Window]:
    """Windows of at most `context` tokens in which every token but a document's first is a target once."""
    for number, ids in enumerate(documents):
        known = np.asarray(ids, np.int64)
        for start in range(0, len(known) - 1, context):
            piece = known[start : start + context + 1]
            yield Window(number, piece[:-1], piece[1:])


class _Read(NamedTuple):
    """Hidden states (B, T, D) after each layer, and the states (B, T, …) that logits are computed from."""

    layers: tuple[Tensor, ...]
    states: Tensor


class _Reader:
    """A model, read without its head where that is a plain one: logits of all positions may not fit into memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.plain = has_plain_head(model)

    def read(self, ids: Tensor) -> _Read:
        network: Any = self.model.base_model if self.plain else self.model
        output = network(input_ids=ids, use_cache=False, output_hidden_states=True)
        return _Read(tuple(output.hidden_states[1:]), output.last_hidden_state if self.plain else output.logits)

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, …). Raises: CheckpointError for NaN and infinity."""
        head: Any = self.model.get_output_embeddings()
        logits: Tensor = head(states.to(head.weight.dtype)) if self.plain else states
        if not (logits < math.inf).all():  # minus infinity forbids a token, and may stay
            raise CheckpointError(
                f"{self.model.config.name_or_path or type(self.model).__name__}: its logits are not finite",
                hint="the model overflows or is damaged: load it in float32, or write it again",
            )
        return logits


def _score(readers: Sequence[_Reader], states: Sequence[Tensor], targets: Tensor) -> Iterator[TokenScores]:
    rows = max(1, CHUNK // readers[0].model.config.get_text_config().vocab_size)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = [reader.logits(state[part]) for reader, state in zip(readers, states, strict=True)]
        yield token_scores(logits[0], logits[1], targets[part])


def _batches(windows: Sequence[Window], batch_size: int, config: Any) -> Iterator[Sequence[Window]]:
    """Windows of similar length together, and no more of them than their hidden states leave room for."""
    settings = config.get_text_config()
    width, start = (settings.num_hidden_layers + 1) * settings.hidden_size, 0
    while start < len(windows):
        size = max(1, min(batch_size, HIDDEN // (width * len(windows[start].inputs))))
        yield windows[start : start + size]
        start += size


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Rows as one tensor (B, T), filled up at the right with IGNORED: causal models do not look there."""
    filled = np.full((len(rows), max(map(len, rows))), IGNORED)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(filled)


def _summarize(owners: NDArray[np.int64], scores: TokenScores, layer_errors: tuple[float, ...]) -> Comparison:
    documents, places = np.unique(owners, return_inverse=True)
    counts = np.bincount(places).astype(float)

    def over_documents(values: Tensor) -> Interval:
        sums = np.bincount(places, weights=values.numpy())
        return bootstrap_ratio(sums.tolist(), counts.tolist(), resamples=RESAMPLES)

    levels = np.quantile(scores.kl.numpy(), np.asarray(QUANTILES) / 100)
    return Comparison(
        kl=over_documents(scores.kl),
        kl_quantiles=tuple(zip(map(float, QUANTILES), levels.tolist(), strict=True)),
        agreement=over_documents(scores.agree),
        loss_a=over_documents(scores.nats_a),
        loss_b=over_documents(scores.nats_b),
        loss_difference=over_documents(scores.nats_b - scores.nats_a),
        layer_errors=layer_errors,
        document_kl=tuple(np.bincount(places, weights=scores.kl.numpy()).tolist()),
        document_tokens=tuple(np.bincount(places).tolist()),
        tokens=len(owners),
        documents=len(documents),
    )


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    settings = model.config.get_text_config()
    return settings.num_hidden_layers, settings.hidden_size


def _check_vocabularies(a: PreTrainedModel, b: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (a, b)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the models have vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens, expected one and the same",
            hint="compare a model with its own quantized, fine-tuned or distilled version",
        )
