"""Code length: token nats + the code's bits + header bits, per document, as bits per byte with an interval.

A decoder's loss given a code is no code length, however low: the receiver needs the code too. So every total here is
the sum of all three parts, and none can be left out. What is charged: every token, the first and the end-of-text ones
included; m log2 n bits for each segment that sends a code; and, where each segment may choose between its code and the
null mode, one bit that says which.

In expectation this is an upper bound of the entropy of segments read with a fresh context, on text that the model was
not trained on. A file is one sample of it: hence the bootstrap interval over documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.stats import Interval, bootstrap_ratio
from luthier.learn.evaluate import TokenStream

Floats = NDArray[np.float64]
MODE_BITS = 1.0  # of a segment that says whether a code follows


class Coder(Protocol):
    """What is measured: see `network.EntropyModel`."""

    @property
    def code_bits(self) -> float: ...
    def encode(self, ids: Tensor, *, mask: Tensor | None = None) -> Tensor: ...
    def nats(self, ids: Tensor, code: Tensor | None, *, mask: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Documents cut into segments that are coded one by one."""

    ids: NDArray[np.int64]
    """(S, T) token ids, filled up on the right with whatever id."""
    lengths: NDArray[np.int64]
    """(S,) real tokens of each segment, at least 1."""
    documents: NDArray[np.int64]
    """(S,) the document that each belongs to, ascending from 0."""
    num_bytes: NDArray[np.int64]
    """(D,) UTF-8 bytes of each document."""

    def head(self, segments: int) -> Segments:
        """The first whole documents of at most so many segments, but at least one document."""
        ends = np.searchsorted(self.documents, np.arange(len(self.num_bytes)), side="right")
        count = max(1, int(np.searchsorted(ends, segments, side="right")))
        last = int(ends[count - 1])
        return Segments(
            ids=self.ids[:last],
            lengths=self.lengths[:last],
            documents=self.documents[:last],
            num_bytes=self.num_bytes[:count],
        )


def cut(stream: TokenStream, window: int) -> Segments:
    """Each document of a stream in segments of `window` tokens; the last one of a document may be shorter."""
    ends = np.append(stream.starts[1:], len(stream.tokens))
    places = [
        (document, start, min(window, int(end) - start))
        for document, (begin, end) in enumerate(zip(stream.starts, ends, strict=True))
        for start in range(int(begin), int(end), window)
    ]
    ids = np.zeros((len(places), window), np.int64)
    for row, (_, start, length) in enumerate(places):
        ids[row, :length] = stream.tokens[start : start + length]
    documents, _, lengths = np.array(places, np.int64).reshape(-1, 3).T
    return Segments(ids=ids, lengths=lengths, documents=documents, num_bytes=stream.num_bytes)


def rows_as_documents(tokens: NDArray[np.int64]) -> Segments:
    """Each row (S, T) as a document of one segment, a token counting as a byte."""
    count, length = tokens.shape
    every = np.full(count, length, np.int64)
    return Segments(ids=tokens, lengths=every, documents=np.arange(count), num_bytes=every)


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """What documents cost, (D,) each. There is no total without one of the three parts."""

    token_nats: Floats
    """Nats of all tokens, given the code where one was sent. No code length by itself."""
    code_bits: Floats
    """Bits of the codes."""
    header_bits: Floats
    """Bits that say how the segments are coded."""
    num_tokens: NDArray[np.int64]
    """Tokens, all of them charged."""
    num_bytes: NDArray[np.int64]
    """UTF-8 bytes of the original text."""

    def __post_init__(self) -> None:
        parts = (self.token_nats, self.code_bits, self.header_bits, self.num_tokens, self.num_bytes)
        shapes = {np.shape(part) for part in parts}
        if len(shapes) != 1 or len(shapes.copy().pop()) != 1 or not len(self.token_nats):
            raise ValueError(f"a code length needs five equal, non-empty rows, got shapes {sorted(shapes)}")
        if not all(np.isfinite(part).all() and (np.asarray(part) >= 0).all() for part in parts[:3]):
            raise ValueError("a code length cannot have infinite or negative parts")

    @property
    def bits(self) -> Floats:
        """(D,) bits of each document, everything charged."""
        return self.token_nats / math.log(2) + self.code_bits + self.header_bits

    @property
    def nats_per_token(self) -> float:
        """Everything charged, over all tokens."""
        return float(self.bits.sum() * math.log(2) / self.num_tokens.sum())

    @property
    def bits_per_byte(self) -> Interval:
        """Everything charged, with a bootstrap interval over documents."""
        return bootstrap_ratio(self.bits.tolist(), self.num_bytes.astype(float).tolist(), resamples=2000)

    @property
    def shares(self) -> dict[str, float]:
        """Bits per byte of each part; they add up to `bits_per_byte`."""
        total = float(self.num_bytes.sum())
        return {
            "tokens given the code": float(self.token_nats.sum()) / math.log(2) / total,
            "code": float(self.code_bits.sum()) / total,
            "header": float(self.header_bits.sum()) / total,
        }

    def row(self) -> dict[str, Any]:
        """The figures by name: for metrics and JSON. A single document has no interval."""
        interval = self.bits_per_byte
        bounds = {"low": interval.low, "high": interval.high} if interval.n > 1 else {}
        return {
            "loss": self.nats_per_token,
            "bits_per_byte": interval.value,
            **bounds,
            "shares": self.shares,
            "documents": interval.n,
            "scored_tokens": int(self.num_tokens.sum()),
            "bytes": int(self.num_bytes.sum()),
        }


class Measured(NamedTuple):
    """The same segments, coded in three ways."""

    null: CodeLength
    """No codes: a causal language model. Nothing has to be said about modes."""
    code: CodeLength
    """A code for every segment."""
    cheaper: CodeLength
    """For each segment the cheaper of the two, and a bit that says which."""
    coded: float
    """Share of the segments whose code pays for itself."""


def measure(model: Coder, segments: Segments, *, batch_size: int = 32, padding_side: str = "right") -> Measured:
    """Code lengths of all segments under `model`, which was not trained on them. The model stays in its mode."""
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    null, code = np.zeros(len(segments.ids)), np.zeros(len(segments.ids))
    with torch.no_grad():
        for rows, ids, mask in _batches(segments, batch_size, padding_side, device):
            null[rows] = model.nats(ids, None, mask=mask).double().sum(1).cpu().numpy()
            code[rows] = model.nats(ids, model.encode(ids, mask=mask), mask=mask).double().sum(1).cpu().numpy()
    bits, zeros = np.full(len(null), model.code_bits), np.zeros(len(null))
    pays = code + bits * math.log(2) < null
    flags = np.full(len(null), MODE_BITS)
    return Measured(
        null=_by_document(segments, null, zeros, zeros),
        code=_by_document(segments, code, bits, zeros),
        cheaper=_by_document(segments, np.where(pays, code, null), np.where(pays, bits, 0.0), flags),
        coded=float(pays.mean()),
    )


def _batches(
    segments: Segments, batch_size: int, padding_side: str, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, ids (B, T), mask (B, T), None where all is real), T as long as the longest segment of the batch."""
    for start in range(0, len(segments.ids), batch_size):
        rows = slice(start, start + batch_size)
        lengths = segments.lengths[rows]
        longest = int(lengths.max())
        ids = segments.ids[rows, :longest]
        if (lengths == longest).all():
            yield rows, torch.as_tensor(ids, device=device), None
            continue
        real = np.arange(longest) < lengths[:, None]
        if padding_side == "left":
            places = (np.arange(longest) + lengths[:, None]) % longest  # each row turned, so that it ends with text
            ids, real = np.take_along_axis(ids, places, 1), real[:, ::-1]
        yield rows, torch.as_tensor(ids, device=device), torch.as_tensor(real.copy(), device=device)


def _by_document(segments: Segments, nats: Floats, code: Floats, header: Floats) -> CodeLength:
    """Sums over the segments of each document."""
    count = len(segments.num_bytes)
    sums = [
        np.bincount(segments.documents, part, count).astype(np.float64)
        for part in (nats, code, header, segments.lengths)
    ]
    return CodeLength(
        token_nats=sums[0],
        code_bits=sums[1],
        header_bits=sums[2],
        num_tokens=sums[3].astype(np.int64),
        num_bytes=segments.num_bytes,
    )


class BoundCheck(NamedTuple):
    """Whether a code length can be one: its excess over the truth is positive, up to chance."""

    excess: float
    """Mean of charged minus true nats, per segment."""
    standard_error: float

    @property
    def holds(self) -> bool:
        """False when the charged length lies more than three standard errors below the truth: then it is none."""
        return self.excess >= -3 * self.standard_error


def check_bound(charged: Floats, truth: Floats) -> BoundCheck:
    """Compare charged nats (S,) with -ln p of the same segments (S,) under the source itself.

    No code is shorter than the source's own on average, and the difference on the same segments has little noise.
    """
    difference = np.asarray(charged, float) - np.asarray(truth, float)
    return BoundCheck(float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference))))
