"""The masked mixer (arXiv 2409.01482) as Hugging Face classes for transformers 5: `MixerModel`, `MixerForCausalLM`.

Where a transformer has attention, a mixer has one learned matrix over positions: position t reads positions <= t with
weights that depend on the positions alone. No softmax, no positional encoding; the length is baked into the matrices.
Shorter inputs use their upper left corners, which is what padding on the right would give.

Departures from the published code: the mask is a buffer that the functional call multiplies by (theirs overwrites the
weights inside forward, so that gradients and moments still reach masked entries); each head has its own matrix (theirs
reads the last head's for all); no input is longer than the matrices, and none is padded on the left, without an error.

Shapes in comments: B batch, T tokens, N longest input, D width, H heads (1 when flat), E head size, K kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from luthier.models.mixer_config import MixerConfig


def mix_tokens(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mix positions: y[t, f] = b[t] + sum over s and j of W[t, s, j] x[s, f + j - (K - 1) // 2], zero outside.

    x (B, H, T, E), weight (H, T, T, K) with zeros where s > t, bias (H, T) -> (B, H, T, E). For K = 1 this is W @ x.
    """
    kernel, width = weight.shape[-1], x.shape[-1]
    before = (kernel - 1) // 2  # an even kernel reaches one further to the right, as in torch's padding "same"
    padded = F.pad(x, (before, kernel - 1 - before))
    taps = (weight[..., j] @ padded[..., j : j + width] for j in range(kernel))
    return sum(taps, start=bias[..., None])


class MixerTokens(nn.Module):
    """The mixing of positions, flat or in heads with projections around them."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        heads, length = max(1, config.num_heads), config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(heads, length, length, config.kernel_size))
        self.bias = nn.Parameter(torch.empty(heads, length))
        width = config.hidden_size
        self.in_proj = nn.Linear(width, width) if config.num_heads else nn.Identity()  # all heads in one product
        self.out_proj = nn.Linear(width, width) if config.num_heads else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D), mask (N, N) lower triangular -> (B, T, D)."""
        length, heads = x.shape[1], self.weight.shape[0]
        weight = self.weight[:, :length, :length] * mask[:length, :length, None]
        split = self.in_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, E)
        mixed = mix_tokens(split, weight, self.bias[:, :length])
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MixerBlock(nn.Module):
    """x + mix(norm(x)), then x + MLP(norm(x)), with LayerNorm and GELU."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.mixer_norm = nn.LayerNorm(width)
        self.mixer = MixerTokens(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class MixerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config_class = MixerConfig
    base_model_prefix = "model"
    _no_split_modules = ["MixerBlock"]  # noqa: RUF012 (the library declares it as a plain attribute)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mixing weights start as a convolution's do in torch; the rest as the library's default."""
        super()._init_weights(module)
        if isinstance(module, MixerTokens):
            fan_in = module.weight.shape[-1] * module.weight.shape[-2]
            initialization.uniform_(module.weight, -(fan_in**-0.5), fan_in**-0.5)
            initialization.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
        if isinstance(module, MixerModel):  # loading leaves buffers that are not stored without values
            initialization.copy_(module.mask, torch.ones_like(module.mask).tril())


class MixerModel(MixerPreTrainedModel):
    """Embeddings and blocks: token ids (B, T), T <= N, to hidden states (B, T, D). There is no final norm."""

    mask: Tensor

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        length = config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MixerBlock(config) for _ in range(config.num_hidden_layers)])
        self.register_buffer("mask", torch.ones(length, length).tril(), persistent=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states; `attention_mask` (B, T) may be 0 on the right only. ValueError for what a mixer cannot do."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache:
            raise ValueError("a masked mixer has no key-value cache: it reads the whole input each time")
        if attention_mask is not None and bool((attention_mask.diff(dim=1) > 0).any()):
            raise ValueError("a masked mixer sees padding on the left: pad on the right")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] > len(self.mask):
            raise ValueError(f"got {x.shape[1]} tokens, but the mixing matrices have {len(self.mask)} positions")
        for layer in self.layers:
            x = layer(x, self.mask)
        return BaseModelOutput(last_hidden_state=x)


class MixerForCausalLM(MixerPreTrainedModel):
    """The language model: token ids (B, T) to next-token logits (B, T, V). It scores text; it does not generate."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.model = MixerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, and with `labels` (B, T; -100 ignored) the mean cross-entropy of the next token in nats."""
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=use_cache
        ).last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
