"""Held-out code length: nats of every token of a text, and bits per byte with an interval over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from luthier.core.stats import Interval, bootstrap_ratio
from luthier.learn.objectives import IGNORED, CausalLoss
from luthier.learn.parallel import Ranks
from luthier.learn.sequence_parallel import own_tokens


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """Documents one after another, each closed by its end token: what is scored.

    tokens (N,) int64; starts (D,) index of each document's first token; num_bytes (D,) UTF-8 bytes of each document.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None
    """(N,) 1 on the tokens that count; None: all. Of conversations the replies count, in `num_bytes` too."""

    def head(self, max_tokens: int) -> TokenStream:
        """The first whole documents that fit into `max_tokens`, but at least one."""
        ends = np.append(self.starts[1:], len(self.tokens))
        count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        mask = None if self.mask is None else self.mask[: ends[count - 1]]
        return TokenStream(
            tokens=self.tokens[: ends[count - 1]],
            starts=self.starts[:count],
            num_bytes=self.num_bytes[:count],
            mask=mask,
        )


@torch.no_grad()
def stream_nll(
    objective: CausalLoss,
    tokens: NDArray[np.int64],
    *,
    start_token: int,
    context: int,
    stride: int,
    batch_size: int,
    who: Ranks,
    document_starts: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Nats of each token (N,). Every token is charged, the first one given only `start_token`.

    Windows of `context` tokens advance by `stride`; after the first window only the last `stride` tokens of each are
    scored, so that each sees at least `context - stride` tokens before it. With `document_starts` (D,), tokens see
    those of their own document only, as in training with document masks. Ranks share the windows, and the tokens of
    each window where they compute it together.
    """
    n = len(tokens)
    inputs = np.concatenate([[start_token], tokens[:-1]])
    documents = None if document_starts is None else np.searchsorted(document_starts, np.arange(n) - 1, side="right")
    starts = list(range(0, max(1, n - context + stride), stride))
    result = torch.zeros(n, dtype=torch.float64, device=who.device)
    was_training = objective.training
    objective.eval()
    for first in range(0, len(starts), batch_size * who.data_size):
        # Every rank passes a whole batch each time, short ones filled up: sharded models need all ranks in step.
        batch = {
            "input_ids": np.full((batch_size, context), start_token),
            "targets": np.full((batch_size, context), IGNORED),
            **({} if documents is None else {"document_ids": np.full((batch_size, context), -1)}),
        }
        mine = starts[first + who.data_rank * batch_size :][:batch_size]
        for row, start in enumerate(mine):
            length, seen = min(context, n - start), context - stride if start else 0
            batch["input_ids"][row, :length] = inputs[start : start + length]
            batch["targets"][row, seen:length] = tokens[start + seen : start + length]
            if documents is not None:
                batch["document_ids"][row, :length] = documents[start : start + length]
        own = {name: torch.as_tensor(part, device=who.device) for name, part in own_tokens(batch, who).items()}
        nll = _whole_rows(objective(**own, per_token=True).double(), who)
        for row, start in enumerate(mine):
            length, seen = min(context, n - start), context - stride if start else 0
            result[start + seen : start + length] = nll[row, seen:length]
    objective.train(was_training)
    return who.sum_tensor(result).cpu().numpy()


def _whole_rows(nll: torch.Tensor, who: Ranks) -> torch.Tensor:
    """Losses of this rank's part of each row (B, T/p) at their places in the row (B, T), and 0 elsewhere."""
    before, size = who.sequence_rank, nll.shape[1]
    return nn.functional.pad(nll, (before * size, (who.sequence_parallel - 1 - before) * size))


def code_length(stream: TokenStream, nats: NDArray[np.float64]) -> dict[str, Any]:
    """Loss (nats per token), bits per byte with a bootstrap interval over documents, and the totals behind them.

    A single document has no interval: `low` and `high` are left out.
    """
    counted = len(nats)
    if stream.mask is not None:
        nats, counted = nats * stream.mask, int(stream.mask.sum())
    interval = bits_per_byte_interval(np.add.reduceat(nats, stream.starts), stream.num_bytes)
    bounds = {"low": interval.low, "high": interval.high} if interval.n > 1 else {}
    return {
        "loss": float(nats.sum() / counted),
        "bits_per_byte": interval.value,
        **bounds,
        "documents": interval.n,
        "scored_tokens": counted,
        "bytes": int(stream.num_bytes.sum()),
    }


def interval_text(score: Mapping[str, Any]) -> str:
    """'[1.689, 1.849]' of a `code_length`, or a dash where there is no interval."""
    return f"[{score['low']:.3f}, {score['high']:.3f}]" if "low" in score else "—"


def bits_per_byte_interval(nats: NDArray[np.float64], num_bytes: NDArray[np.int64]) -> Interval:
    """Bits per byte over documents, each with its nats (D,) and UTF-8 bytes (D,)."""
    return bootstrap_ratio((nats / math.log(2)).tolist(), num_bytes.astype(float).tolist(), resamples=2000)
