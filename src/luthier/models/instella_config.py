"""`InstellaConfig`: the Hugging Face configuration of Instella models. Its defaults are the paper's 3B model.

Departures from the released `config.json`: RoPE lives in `rope_parameters` as transformers 5 wants it; the older
top-level `rope_theta` and `rope_scaling` are read as well and written beside it, so that older readers keep working.
`auto_map`, which names a remote Python file, is dropped: the classes are in this package.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from luthier.core.errors import ConfigError
from luthier.models.arithmetic import Dimensions, check_heads, size_table
from luthier.models.register import register_model


class InstellaConfig(PreTrainedConfig):
    """Hyper-parameters of an Instella model, section by section of the paper's table.

    ConfigError when heads do not divide the width or when `attention_bias` asks for biases, which no Instella has.
    """

    model_type = "instella"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it of every architecture that is not in transformers
    # The norm of q and k needs the whole width, so every rank gathers them before it.
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads)
        if self.attention_bias:
            raise ConfigError("attention_bias is true, but Instella has no biases", hint="remove attention_bias")
        super().__post_init__(**kwargs)
        register_model()

    def to_dict(self) -> dict[str, Any]:
        """All settings, RoPE in today's and in the older form."""
        output = super().to_dict()
        rope = self.rope
        output["rope_theta"] = rope.pop("rope_theta", None)
        output["rope_scaling"] = None if rope.get("rope_type") == "default" else {"type": rope.get("rope_type")} | rope
        return output

    @property
    def rope(self) -> dict[str, Any]:
        """The RoPE settings: at least `rope_type` and `rope_theta` once a configuration is built; a copy."""
        return dict(self.rope_parameters or {})

    @property
    def dimensions(self) -> Dimensions:
        """The integers from which `arithmetic.py` computes sizes and costs."""
        return Dimensions(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
        )


def sized_config(size: str, tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> InstellaConfig:
    """The configuration of a named size for a tokenizer: its vocabulary and special token ids; ConfigError if unknown.

    `overrides` are fields of `InstellaConfig`, e.g. `max_position_embeddings=512`.
    """
    settings = size_table(size) | {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return InstellaConfig(**(settings | overrides))
