"""Choosing the next token: pure functions of logits. B rows, V vocabulary entries.

Each row has its own temperature, top_k and top_p, and brings its own uniform random number, so what a row draws does
not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def next_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [B] drawn from logits [B, V] (float32).

    temperature [B]: 0 takes the most likely token. top_k [B]: 0 is off. top_p [B] in (0, 1]: 1 is off.
    uniforms [B] in [0, 1), float64. The filters work on the distribution after temperature, top_k first.
    """
    greedy = temperature == 0
    centered = logits - logits.amax(dim=-1, keepdim=True)  # so that no temperature is too small
    scaled = centered / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    if (top_k > 0).any():
        scaled = keep_top_k(scaled, top_k)
    if (top_p < 1).any():
        scaled = keep_top_p(scaled, top_p)
    return torch.where(greedy, logits.argmax(dim=-1), draw(scaled.softmax(dim=-1), uniforms))


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Logits [B, V] with all but each row's top_k [B] largest at -inf; 0 keeps all, ties with the k-th are kept."""
    position = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1]) - 1
    smallest = logits.sort(dim=-1, descending=True).values.gather(1, position[:, None])
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Logits [B, V] with all but the smallest set of most likely tokens of mass >= top_p [B] at -inf (nucleus)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    beyond = (mass_before >= top_p[:, None]) & (top_p < 1)[:, None]
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [B] by inversion: the first token at which the cumulated probability [B, V] exceeds uniforms [B].

    Cumulated in float64 and scaled by the row's total, so a token of probability 0 is never drawn.
    """
    cumulated = probabilities.double().cumsum(dim=-1)
    total = cumulated[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulated, uniforms[:, None] * total, right=True)
    last_possible = torch.searchsorted(cumulated, total)  # uniform * total may round up to the total
    return torch.minimum(drawn, last_possible)[:, 0]
