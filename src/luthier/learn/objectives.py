"""Cross-entropy as a sum in nats, without ever holding the logits of a whole batch.

Losses are sums; the loop divides once by the number of targets over all micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.data.shards import IGNORED as IGNORED

CHUNK = {"cpu": 256, "cuda": 8192}  # tokens whose logits exist at once: on a CPU they should stay in its cache


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood in nats of each target: hidden (N, D), weight (V, D), targets (N) -> (N), no gradient."""
    losses = [
        F.cross_entropy((rows @ weight.T).float(), wanted, ignore_index=IGNORED, reduction="none")
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def cross_entropy_sum_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same sum from whole logits (N, V) in fp32: the oracle of `linear_cross_entropy`."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Summed cross-entropy in nats of hidden (N, D) @ weight.T (V, D) against targets (N), in chunks of tokens.

    Gradients are computed in the forward pass, where each chunk of logits is still at hand, so memory is
    O(chunk * V) and nothing is computed twice. Equal to `cross_entropy_sum_reference` up to rounding.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            counted = wanted != IGNORED
            index = wanted.where(counted, 0)[:, None]
            logits = (rows @ weight.T).float()
            log_normalizer = torch.logsumexp(logits, 1, keepdim=True)
            total += (log_normalizer - logits.gather(1, index)).squeeze(1).where(counted, 0).sum()
            # d nll / d logits = softmax - one-hot; an infinite normalizer makes the softmax of an ignored row zero.
            log_normalizer = log_normalizer.where(counted[:, None], float("inf"))
            slope = logits.sub_(log_normalizer).exp_().scatter_add_(1, index, -counted[:, None].float())
            slope = slope.to(weight.dtype)
            torch.mm(slope, weight, out=hidden_gradient[start : start + chunk])
            weight_gradient += slope.T @ rows
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * scales[0], weight_gradient * scales[0], None, None


class CausalLoss(nn.Module):
    """A causal language model and its loss as one module, so that sharding and compiling see the whole step.

    Models whose logits are exactly hidden states times the head's weight use the chunked loss; others (soft-capped or
    scaled logits, a biased head) go through their own forward. `plain_head` says which; `has_plain_head` measures it.
    """

    def __init__(self, model: PreTrainedModel, *, plain_head: bool) -> None:
        super().__init__()
        self.model = model
        self.plain_head = plain_head

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Summed loss (scalar), or with `per_token` the loss of each target (B, T); fp32 nats."""
        given = {"document_ids": document_ids, "position_ids": position_ids}
        extra = {name: value for name, value in given.items() if value is not None}
        chunk = CHUNK.get(input_ids.device.type, CHUNK["cpu"])
        if self.plain_head:
            output = self.model.base_model(input_ids=input_ids, use_cache=False, **extra)
            hidden, weight = output.last_hidden_state.flatten(0, 1), self.model.get_output_embeddings().weight
            hidden = hidden.to(weight.dtype)
            if per_token:
                return token_nll(hidden, weight, targets.flatten(), chunk).view(targets.shape)
            return linear_cross_entropy(hidden, weight, targets.flatten(), chunk)
        logits = self.model(input_ids=input_ids, use_cache=False, **extra).logits.flatten(0, 1).float()
        reduction = "none" if per_token else "sum"
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
        return loss.view(targets.shape) if per_token else loss


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its last hidden states times the output embedding, seen on a probe input."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return False
    with _without_dropout(model):
        probe = _probe(model)
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        logits = model(input_ids=probe, use_cache=False).logits
    return torch.allclose(hidden @ head.weight.T, logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether no position sees the tokens after it, seen on a probe input: those of encoders such as BERT do."""
    with _without_dropout(model):
        probe = _probe(model)
        other = probe.clone()
        other[:, -1] = 0
        before, after = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (probe, other))
    return torch.allclose(before, after, rtol=1e-4, atol=1e-5)


def _probe(model: PreTrainedModel) -> Tensor:
    """A row of eight different token ids (1, 8), the last of them not 0."""
    embedding = next(model.get_input_embeddings().parameters())
    return torch.arange(8, device=embedding.device)[None] % embedding.shape[0]


@contextlib.contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
