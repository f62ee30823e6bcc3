"""Instella as Hugging Face classes for transformers 5: `InstellaModel`, `InstellaForCausalLM` (arXiv 2511.10628).

A pre-norm decoder: RMSNorm, full multi-head attention, SwiGLU, RoPE, no biases, untied embeddings. Its one unusual
part is the norm of queries and keys: over the whole projection, before it is split into heads and rotated.

Departures from the class that ships with the released weights:
- RoPE rotates in float32 and casts the result, as the paper's trainer does (the shipped class rotates in bfloat16).
- `document_ids` keeps attention inside each document of a packed row.
- No cache is made in training mode unless asked for, and an unpadded batch gets no mask tensor.

Shapes in comments: B batch, T tokens, D hidden width, H heads, K key-value heads, E head size, V vocabulary.
"""

# ruff: noqa: RUF012 (the library declares these class attributes as plain ones)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import capture_outputs

from luthier.models.instella_config import InstellaConfig

DOCUMENT_MASK_ATTENTION = ("sdpa", "flex_attention", "eager")


class InstellaRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) in float32, cast back to the input's dtype, then scaled: the order matters in bfloat16."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalized = nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return normalized.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class InstellaRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles, (positions, E) each, always float32.

    The frequencies are derived from the configuration and never stored, so every move or cast of the module computes
    them anew: neither loading through the meta device nor `.to(bfloat16)` can leave wrong ones behind.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: InstellaConfig, device: Any = None, **_: Any) -> tuple[Tensor, float]:
        """θ^(-2j/E) for j < E/2 in float32, and the factor 1 for the angles' cosines and sines."""
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / config.rope["rope_theta"] ** exponents, 1.0

    def _frequencies(self) -> tuple[Tensor, float]:
        if self.rope_type == "default":
            return self.compute_default_rope_parameters(self.config)
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)

    def restore_frequencies(self) -> None:
        """Compute both buffers anew on the device where they are."""
        device = self.inv_freq.device
        with torch.device("cpu"):  # the same bits on every device
            inv_freq, self.attention_scaling = self._frequencies()
        self.inv_freq, self.original_inv_freq = inv_freq.to(device), inv_freq.to(device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InstellaRotaryEmbedding:
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:
            self.restore_frequencies()
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of every head; x is (B, T, H, E), cos and sin are (B or 1, T, 1, E) float32."""
    x = x.float()
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for inspection of the weights; inputs (B, H or K, T, E), output (B, T, H, E)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class InstellaAttention(nn.Module):
    """Causal attention with queries and keys normalized over the whole width before the split into heads."""

    def __init__(self, config: InstellaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width, key_value = config.hidden_size, config.dimensions.key_value_width
        self.head_dim = config.dimensions.head_dim
        self.num_key_value_groups = width // key_value
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_value, bias=False)
        self.v_proj = nn.Linear(width, key_value, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = InstellaRMSNorm(width, config.rms_norm_eps)
        self.k_norm = InstellaRMSNorm(key_value, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x)).view(heads)  # (B, T, H, E)
        key = self.k_norm(self.k_proj(x)).view(heads)  # (B, T, K, E)
        value = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, E)
        query = rotate(query, *rotation).to(value.dtype).transpose(1, 2)
        key = rotate(key, *rotation).to(value.dtype).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*x.shape[:-1], -1)), weights


class InstellaMLP(nn.Module):
    """SwiGLU: down(silu(gate x) ⊙ up x)."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InstellaDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: InstellaConfig, layer_idx: int) -> None:
        super().__init__()
        self.pre_attention_layernorm = InstellaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = InstellaAttention(config, layer_idx)
        self.pre_feedforward_layernorm = InstellaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = InstellaMLP(config)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.pre_attention_layernorm(x), **kwargs)
        x = x + attended
        return x + self.mlp(self.pre_feedforward_layernorm(x))


class InstellaPreTrainedModel(PreTrainedModel):
    """What the library has to know about Instella: names, attention kernels, checkpointing."""

    config: InstellaConfig
    config_class = InstellaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InstellaDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": InstellaDecoderLayer, "attentions": InstellaAttention}


class InstellaModel(InstellaPreTrainedModel):
    """The decoder without its head: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(InstellaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = InstellaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = InstellaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm; the arguments are those of `InstellaForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and document_ids is None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask = self._attention_mask(x, attention_mask, position_ids, cache, document_ids)

        positions = position_ids
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(x.shape[1], device=x.device)[None] + seen
        cos, sin = self.rotary_emb(x, position_ids=positions)
        rotation = (cos[:, :, None], sin[:, :, None])  # (B or 1, T, 1, E)

        for layer in self.layers:
            x = layer(
                x,
                rotation=rotation,
                attention_mask=mask,
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)

    def _attention_mask(
        self,
        x: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        document_ids: Tensor | None,
    ) -> Any:
        """What the chosen attention kernel needs: None when SDPA's own causal flag says it all."""
        same_document = None
        if document_ids is not None:
            self._check_document_ids(cache)
            same_document = packed_sequence_mask_function(document_ids)
        elif self.config._attn_implementation == "sdpa" and all(
            given is None for given in (attention_mask, position_ids, cache)
        ):
            # create_causal_mask concludes this too, but in code compiled by older torch versions it builds a mask.
            return None
        return create_causal_mask(
            # By place: transformers 5.24 calls the last of these `cache`, before it was `cache`.
            self.config,
            x,
            attention_mask,
            cache,
            # Only the caller's positions: resets in them mean packed rows, and looking for resets is not free. Beside
            # document_ids they mean nothing of the kind: positions may skip.
            position_ids=position_ids if document_ids is None else None,
            and_mask_function=same_document,
        )

    def _check_document_ids(self, cache: Cache | None) -> None:
        if cache is not None:
            raise ValueError("document_ids describes whole rows and cannot be combined with a key-value cache")
        if self.config._attn_implementation not in DOCUMENT_MASK_ATTENTION:
            raise ValueError(
                f"document_ids needs one of the attention implementations {DOCUMENT_MASK_ATTENTION}, "
                f"got {self.config._attn_implementation!r}"
            )


class InstellaForCausalLM(InstellaPreTrainedModel, GenerationMixin):
    """The language model: token ids (B, T) to next-token logits (B, T, V)."""

    # Takes effect only when the configuration ties them; no released model does.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__(config)
        self.model = InstellaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with `labels` (B, T; -100 ignored) the mean cross-entropy of the next token in nats.

        `attention_mask` (B, T) is 0 at padding, on either side. `document_ids` (B, T) gives each token of a packed row
        its document: a token then attends to earlier tokens of its own document only. Positions run on over the row.
        `logits_to_keep`: number of last positions (0: all) or their indices. Labels are not cut at document borders:
        set those of each document's first token to -100. ValueError when `document_ids` meets a key-value cache or an
        attention implementation that cannot honor it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
