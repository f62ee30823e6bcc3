"""The second-order model: one forward pass instead of many, as it learns to predict estimates made elsewhere.

Two heads on one causal trunk, both trained with squared error on the same surprisals, differ in what they have seen:

| head           | sees           | its best answer                                                |
|----------------|----------------|----------------------------------------------------------------|
| surprisal_head | tokens to x_t  | the surprisal of x_t                                           |
| entropy_head   | tokens to x_t-1| E[surprisal of x_t | past], which is the conditional entropy    |

The second needs no other model in principle: a causal model's own predictive entropy is what to compare it to. Both
inherit the errors of their targets, and neither bounds anything.

Departure from the published code: it has one head and shifts its targets; here both are trained together, and token 0
has its entropy too, from a learned start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from luthier.core.seeds import derive_seed


class SecondOrderEstimates(NamedTuple):
    """Estimates in nats, both (B, T): neither a bound."""

    surprisal: Tensor
    """Of the token itself, which has been seen."""
    entropy: Tensor
    """Expected before the token is seen."""


class SecondOrderModel(nn.Module):
    """A causal trunk without a language-model head (B, T, D), and two heads of one number each.

    trunk: a Hugging Face base model that takes `inputs_embeds` and reads at least T + 1 places.
    """

    def __init__(self, trunk: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        width = trunk.config.hidden_size
        self.trunk = trunk
        self.tokens = nn.Embedding(vocab_size, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.surprisal_head = nn.Linear(width, 1)
        self.entropy_head = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> SecondOrderEstimates:
        """Both estimates of each token of ids (B, T), in nats."""
        first = self.start.expand(len(ids), 1, -1)
        inputs = torch.cat((first, self.tokens(ids)), 1)
        hidden = self.trunk(inputs_embeds=inputs, use_cache=False).last_hidden_state
        # Place 0 is the start: hidden t has seen the tokens before t, hidden t + 1 token t as well.
        return SecondOrderEstimates(
            surprisal=self.surprisal_head(hidden[:, 1:])[..., 0], entropy=self.entropy_head(hidden[:, :-1])[..., 0]
        )


def llama_trunk(*, width: int, layers: int, heads: int, window: int) -> PreTrainedModel:
    """A trunk of Llama's blocks for segments of up to `window` tokens; the authors' has width 512 and 16 layers."""
    trunk: PreTrainedModel = LlamaModel(
        LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=window + 1,
            use_cache=False,
        )
    )
    trunk.embed_tokens = None  # type: ignore[assignment]  # it is given embeddings
    return trunk


def squared_error_sum(found: SecondOrderEstimates, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared errors of both heads against surprisals (B, T), summed over real tokens: a scalar, in nats squared."""
    errors = (found.surprisal - targets) ** 2 + (found.entropy - targets) ** 2
    return (errors if mask is None else errors * mask).sum()


def fit(
    model: SecondOrderModel,
    ids: Tensor,
    targets: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train on segments (S, T) and their surprisals (S, T), in nats; returns the loss of each step per token.

    Batches are drawn with replacement, by the seed. The heads start at the mean of the targets, so that the first steps
    are not spent on it.
    """
    if ids.shape != targets.shape:
        raise ValueError(f"targets: got {tuple(targets.shape)} for tokens {tuple(ids.shape)}, expected one for each")
    draw = torch.Generator().manual_seed(derive_seed(seed, "second order", "batches"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for head in (model.surprisal_head, model.entropy_head):
        nn.init.constant_(head.bias, float(targets.mean()))
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(ids), (batch_size,), generator=draw)
        loss = squared_error_sum(model(ids[rows]), targets[rows]) / targets[rows].numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
