"""Code lengths of a text by models that learn from it: prequential (train while coding) and cross-fitted.

Prequential: each block of text is charged under weights that were trained on the blocks before it only, and then
learned. A decoder can do the same, so no weights are sent and no text is held out: the sum is one code length of the
whole file (Dawid 1984; Rissanen's predictive minimum description length). Cross-fitted: each part of the text is scored
by a model that was trained on all others. That is what a new document of this kind would cost; it is no code length of
the file, as each part is used to code the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core.seeds import derive_seed
from luthier.learn.evaluate import stream_nll
from luthier.learn.objectives import CausalLoss
from luthier.learn.parallel import Ranks

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
Progress = Callable[[int], None]
WARMUP = 20  # updates, of which a fresh model needs some


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a model learns from windows of a text."""

    context: int
    """Tokens of a window."""
    windows: int
    """Windows of an update, and of a block between two updates of the prequential code."""
    learning_rate: float
    """Of AdamW, after a warmup; constant."""
    passes: int
    """Prequential: updates after each block. Cross-fitted: passes through the other parts."""
    seed: int = 0
    """Decides which windows are seen when."""


def prequential_nats(
    objective: CausalLoss,
    tokens: Tokens,
    *,
    start_token: int,
    learning: Learning,
    device: torch.device,
    progress: Progress | None = None,
) -> Floats:
    """Nats of each token (N,), each charged before anything was learned from its block. Changes the model.

    Blocks grow from one window to `learning.windows`, so that the first are not charged to a model that knows nothing.
    The first update after a block is on that block, the others on windows drawn from all that is known.
    """
    nats, steps = np.empty(len(tokens)), _Steps(objective, learning, device)
    inputs = np.concatenate([[start_token], tokens[:-1]])
    draw = np.random.Generator(np.random.PCG64(derive_seed(learning.seed, "prequential")))
    start, size = 0, 1
    while start < len(tokens):
        end = min(len(tokens), start + size * learning.context)
        nats[start:end] = _score(objective, tokens, inputs, start, end, learning, device)
        latest = np.arange(start, end, learning.context)
        steps.update(inputs, tokens, latest, end)
        for _ in range(learning.passes - 1):
            steps.update(inputs, tokens, draw.integers(0, max(1, end - learning.context), len(latest)), end)
        if progress is not None:
            progress(end - start)
        start, size = end, min(learning.windows, 2 * size)
    return nats


def cross_fit_nats(
    make: Callable[[], CausalLoss],
    pieces: Sequence[Tokens],
    *,
    start_token: int,
    folds: int,
    learning: Learning,
    device: torch.device,
    progress: Progress | None = None,
) -> list[Floats]:
    """Nats of each token of each piece, scored by a model from `make` that was trained on the other folds.

    Piece i belongs to fold i modulo `folds`. ValueError for fewer pieces than folds.
    """
    if not 2 <= folds <= len(pieces):
        raise ValueError(f"folds: got {folds}, expected 2 to {len(pieces)}, the number of pieces")
    nats: list[Floats] = [np.empty(0)] * len(pieces)
    for fold in range(folds):
        objective = make()
        others = np.concatenate([piece for number, piece in enumerate(pieces) if number % folds != fold])
        inputs = np.concatenate([[start_token], others[:-1]])
        steps = _Steps(objective, learning, device)
        draw = np.random.Generator(np.random.PCG64(derive_seed(learning.seed, "cross-fit", fold)))
        for _ in range(learning.passes):
            starts = np.arange(draw.integers(0, learning.context), len(others), learning.context)
            starts = draw.permutation(starts if len(starts) else np.zeros(1, np.int64))
            for batch in np.split(starts, range(learning.windows, len(starts), learning.windows)):
                steps.update(inputs, others, batch, len(others))
        for number in range(fold, len(pieces), folds):
            piece = pieces[number]
            before = np.concatenate([[start_token], piece[:-1]])
            nats[number] = _score(objective, piece, before, 0, len(piece), learning, device)
        if progress is not None:
            progress(1)
    return nats


def _score(
    objective: CausalLoss,
    tokens: Tokens,
    inputs: Tokens,
    start: int,
    end: int,
    learning: Learning,
    device: torch.device,
) -> Floats:
    """Nats of tokens start .. end, each with at least half a context before it where the text has that."""
    stride = max(1, learning.context // 2)
    first = max(0, start - (learning.context - stride))
    nats = stream_nll(
        objective,
        tokens[first:end],
        start_token=int(inputs[first]),
        context=learning.context,
        stride=stride,
        batch_size=learning.windows,
        who=Ranks(device=device),
    )
    return nats[start - first :]


class _Steps:
    """Updates of one model on windows of tokens."""

    def __init__(self, objective: CausalLoss, learning: Learning, device: torch.device) -> None:
        self.objective, self.learning, self.device = objective, learning, device
        self.optimizer = torch.optim.AdamW(
            objective.parameters(), lr=learning.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.done = 0

    def update(self, inputs: Tokens, tokens: Tokens, starts: Tokens, end: int) -> None:
        """One step on the windows at `starts`, none of which reads beyond `end`."""
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning.learning_rate * min(1.0, self.done / WARMUP)
        self.objective.train()
        self.optimizer.zero_grad()
        count = 0
        # Windows of one length go through in one pass; only the last of a text is shorter.
        for length in sorted({min(self.learning.context, end - int(start)) for start in starts}):
            rows = [start for start in starts if min(self.learning.context, end - int(start)) == length]
            places = np.asarray(rows)[:, None] + np.arange(length)
            before, wanted = (torch.as_tensor(row[places], device=self.device) for row in (inputs, tokens))
            self.objective(before, wanted).backward()
            count += wanted.numel()
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
