"""What single tokens cost: five numbers, each with what it is and what it is not (`ESTIMATORS`).

None of them bounds an entropy token by token. Those that sum to a code length say so; the sum over a text is then an
upper bound in expectation, under the conditions of `UPPER_BOUND`.

Departures from the published code: windows are not shifted through N forward passes each, but masked and stacked, N
rows in a few passes, none computed twice; the first token is charged; occlusion replaces the code by the learned null
of a network trained with it, not by zeros that it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

PaddingSide = Literal["left", "right"]
Distance = Literal["l1", "cosine", "loss"]

UPPER_BOUND = (
    "Upper bound in expectation, not for one text. It holds if the model was fixed before this text was known (else "
    "its own bytes count, or it is trained while it codes), if every token, the end and the code of each segment are "
    "charged in full and as quantized, if the tokenizer is lossless, and if none of the text was in the training data. "
    "It bounds the entropy of text cut into contexts as they were used, which exceeds the entropy rate of its source."
)


class TokenModel(Protocol):
    """What the estimators need: an entropy-estimation model, or a causal language model inside `CausalScorer`.

    B segments of T tokens; `mask` (B, T) is true at real tokens; a code of None is the null mode.
    """

    @property
    def code_bits(self) -> float:
        """Bits that the code of one segment costs; 0 for a model without codes."""

    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """-ln p of each token (B, T) in nats, token 0 included, 0 at padding."""

    def logits(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of which row t predicts token t."""

    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The code of each segment (B, m)."""


class CausalScorer:
    """Any Hugging Face causal language model as a `TokenModel` without codes; padding on the right.

    `start_token` stands before token 0, which it predicts; the end-of-text token for most models.
    """

    code_bits = 0.0

    def __init__(self, model: PreTrainedModel, start_token: int) -> None:
        self.model = model
        self.start_token = start_token

    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """-ln p of each token (B, T) in nats, token 0 included, 0 at padding."""
        logits = self.logits(ids, code, mask=mask)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view(ids.shape)
        return nats if mask is None else nats.masked_fill(~mask.bool(), 0.0)

    def logits(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of which row t predicts token t. ValueError for a code."""
        if code is not None:
            raise ValueError("code: a causal language model takes none, expected None")
        first = torch.full_like(ids[:, :1], self.start_token)
        found: Tensor = self.model(input_ids=torch.cat((first, ids[:, :-1]), 1), use_cache=False).logits
        return found

    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Raises ValueError: there is no encoder."""
        raise ValueError("a causal language model has no encoder: use the null mode, code None")


# The numbers, in the order in which to prefer them.


@torch.no_grad()
def surprisal(model: TokenModel, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """-ln p(x_t | x_<t) of the causal model in nats (B, T): sums to the length of a real code."""
    return model.nats(ids, None, mask=mask)


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each predicted distribution: logits (..., V) to (...). What the model expects to pay."""
    log_p = torch.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def allocate(given: Tensor, null: Tensor, code_nats: float, *, mask: Tensor | None = None) -> Tensor:
    """The code's cost charged to the tokens that it helped, in proportion to the nats that it saved (B, T).

    given, null (B, T): nats of each token with and without the code, code_nats: cost of a segment's code. Each row sums
    to its decoder loss plus `code_nats`; nothing is negative. Where the code helped no token, all share its cost.
    """
    real = torch.ones_like(given, dtype=torch.bool) if mask is None else mask.bool()
    gain = (null - given).clamp_min(0).masked_fill(~real, 0)
    total = gain.sum(1, keepdim=True)
    share = torch.where(total > 0, gain / total.where(total > 0, 1), real / real.sum(1, keepdim=True))
    return (given + code_nats * share).masked_fill(~real, 0)


@torch.no_grad()
def allocation(model: TokenModel, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Accounted allocation in nats (B, T): sums to the whole code length of each segment. Two forward passes."""
    code = model.encode(ids, mask=mask)
    given, null = (model.nats(ids, which, mask=mask) for which in (code, None))
    return allocate(given, null, model.code_bits * math.log(2), mask=mask)


@dataclass(frozen=True, kw_only=True)
class WindowDifferences:
    """How much the decoder's total loss grows when the window does: uncharged, and maybe negative."""

    ends: Tensor
    """(P,) int64, ascending: the windows are the first `ends` tokens of each segment; the first may be empty."""
    totals: Tensor
    """(B, P) nats of all tokens of each window, given the window's own code."""
    code_bits: float
    """Bits of the code of each segment, which cancel in differences."""

    @property
    def differences(self) -> Tensor:
        """(B, P - 1) nats of the tokens between two ends; they sum to the last total less the first."""
        return self.totals.diff(dim=1)

    @property
    def negatives(self) -> int:
        """How many estimates are below zero, which no surprisal can be."""
        return int((self.differences < 0).sum())

    @property
    def deficit_bits(self) -> float:
        """Bits of each segment that the estimates leave out, those of its code."""
        return self.code_bits


@torch.no_grad()
def window_differences(
    model: TokenModel,
    ids: Tensor,
    *,
    last: int | None = None,
    stride: int = 1,
    batch_size: int = 64,
    padding_side: PaddingSide = "right",
) -> WindowDifferences:
    """S(first t tokens) - S(first t - stride tokens) of each segment (B, T), where S is loss given the window's code.

    last: only the last so many tokens; all by default. With stride > 1 each estimate is that of so many tokens
    together. batch_size: windows in one pass. padding_side: as the model was trained. Cost: the encoder and decoder on
    T / stride windows a segment. Raises: ValueError for a stride or last out of range.
    """
    segments, length = ids.shape
    last = length if last is None else last
    if not 1 <= last <= length or not 1 <= stride <= last:
        raise ValueError(f"last and stride: got {last} and {stride}, expected 1 <= stride <= last <= {length}")
    ends = torch.arange(length, length - last - 1, -stride).flip(0)
    if ends[0] > length - last:
        ends = torch.cat((torch.tensor([length - last]), ends))
    totals = torch.zeros(segments, len(ends), dtype=torch.float64, device=ids.device)
    rows = [(row, column) for column in range(len(ends)) if ends[column] for row in range(segments)]
    for start in range(0, len(rows), batch_size):
        row, column = torch.tensor(rows[start : start + batch_size]).T
        windows, mask = _windows(ids, row, ends[column], padding_side)
        code = model.encode(windows, mask=mask) if model.code_bits else None
        totals[row, column] = model.nats(windows, code, mask=mask).double().sum(1)
    return WindowDifferences(ends=ends, totals=totals, code_bits=model.code_bits)


def _windows(ids: Tensor, rows: Tensor, lengths: Tensor, padding_side: PaddingSide) -> tuple[Tensor, Tensor]:
    """The first `lengths` tokens of some rows (N, longest), padded with their first token, and the mask."""
    longest = int(lengths.max())
    place, lengths = torch.arange(longest, device=ids.device)[None], lengths.to(ids.device)[:, None]
    source = place - (longest - lengths) if padding_side == "left" else place
    mask = (source >= 0) & (source < lengths)
    return ids[rows.to(ids.device)[:, None], source.where(mask, 0)], mask


@torch.no_grad()
def window(model: TokenModel, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Window differences of every token in nats (B, T). ValueError for segments with padding."""
    if mask is not None and not bool(mask.all()):
        raise ValueError("window differences need whole segments: give each length a call of its own")
    side: PaddingSide = getattr(getattr(model, "eem", None), "padding_side", "right")
    return window_differences(model, ids, padding_side=side).differences.float()


@torch.no_grad()
def occlusion(
    model: TokenModel, ids: Tensor, *, mask: Tensor | None = None, distance: Distance = "l1", normalized: bool = False
) -> Tensor:
    """How far the prediction of each token moves when its segment's code is taken away (B, T); no nats, but relative.

    distance: l1 over logits, 1 - cosine of logits, or the absolute change of the loss. normalized: scale each segment
    to 0 .. 1, as the published attribution does. 0 at padding.
    """
    code = model.encode(ids, mask=mask)
    if distance == "loss":
        moved = (model.nats(ids, code, mask=mask) - model.nats(ids, None, mask=mask)).abs()
    else:
        given, null = (model.logits(ids, which, mask=mask).float() for which in (code, None))
        moved = (given - null).abs().sum(-1) if distance == "l1" else 1 - F.cosine_similarity(given, null, dim=-1)
    if normalized:
        moved = min_max(moved, mask)
    return moved if mask is None else moved.masked_fill(~mask.bool(), 0)


def min_max(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Values (B, T) of each segment scaled so that its least is 0 and its greatest 1; padding is left out and 0."""
    real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    low = values.masked_fill(~real, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~real, float("-inf")).amax(1, keepdim=True)
    return ((values - low) / (high - low).where(high > low, 1)).masked_fill(~real, 0)


def move_nats(nats: NDArray[np.float64], sizes: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nats of tokens (N,) as nats of another tokenizer's tokens (M,) of the same text; the total stays what it was.

    sizes (N,), wanted (M,): bytes of each token. A token's nats are spread evenly over its bytes, and those of each
    wanted token summed (averages, as published, would not add up to anything). ValueError unless both cover the text.
    """
    if sizes.sum() != wanted.sum() or min(sizes.min(), wanted.min()) < 1:
        raise ValueError(f"tokens of {sizes.sum()} and {wanted.sum()} bytes, expected the same text and no empty token")
    edges, total = np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0.0], np.cumsum(nats)])
    return np.diff(np.interp(np.concatenate([[0], np.cumsum(wanted)]), edges, total))


class Label(NamedTuple):
    """The words that go with a number wherever it is shown."""

    name: str
    what: str
    is_not: str


class TokenEstimator(NamedTuple):
    """A number for each token; `estimate(model, ids, mask=...)` gives (B, T)."""

    label: Label
    estimate: Callable[..., Tensor]
    needs_code: bool
    is_nats: bool = True


ESTIMATORS: dict[str, TokenEstimator] = {
    "surprisal": TokenEstimator(
        Label(
            "surprisal estimate",
            "what each token costs under the causal model; the sum is the length of a real code",
            "not an entropy: it is what came, not what was to be expected; no bound for a single token",
        ),
        surprisal,
        needs_code=False,
    ),
    "allocation": TokenEstimator(
        Label(
            "accounted surprisal estimate",
            "what each token costs given its segment's code, and the code's own bits charged to the tokens that it "
            "helped; the sum is the whole code length, and nothing is negative",
            "not an entropy; no bound for a single token",
        ),
        allocation,
        needs_code=True,
    ),
    "window": TokenEstimator(
        Label(
            "window difference, uncharged, may be negative",
            "how much the decoder's loss grows when the window grows by the token; the sum is the decoder's loss alone",
            "not a code length, as the code of each segment is left out; not an entropy; no bound of any kind",
        ),
        window,
        needs_code=True,
    ),
    "occlusion": TokenEstimator(
        Label(
            "occlusion, relative",
            "how far the prediction of each token moves when the segment's code is taken away",
            "not bits and not an entropy: it shows where the code is used",
        ),
        occlusion,
        needs_code=True,
        is_nats=False,
    ),
}
"""In the order in which to prefer them."""
PREDICTIVE_ENTROPY = Label(
    "predictive entropy",
    "what the model expects to pay before it sees the token",
    "the model's opinion, not the source's entropy: a mean loss far above its mean tells an over-confident model",
)


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """What a model thought of each token of N."""

    nats: Tensor
    """(N,) -ln p of the token that came."""
    entropy: Tensor
    """(N,) nats of the predicted distribution."""
    rank: Tensor
    """(N,) int64, 1 for the most probable token; equally probable ones count as better."""
    top: Tensor
    """(N, k) ids of the most probable tokens."""
    top_p: Tensor
    """(N, k) their probabilities."""


@torch.no_grad()
def describe(logits: Tensor, ids: Tensor, *, top: int = 5) -> TokenDetails:
    """Details of tokens (N,) from logits (N, V) of which row t predicts token t."""
    log_p = torch.log_softmax(logits.float(), -1)
    own = log_p.gather(1, ids[:, None])
    best = log_p.topk(min(top, log_p.shape[1]), 1)
    return TokenDetails(
        nats=-own[:, 0],
        entropy=predictive_entropy(logits),
        rank=(log_p >= own).sum(1),
        top=best.indices,
        top_p=best.values.exp(),
    )
