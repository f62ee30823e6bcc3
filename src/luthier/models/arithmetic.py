"""What an Instella model costs, from its dimensions alone: parameters, tensors, cache bytes, FLOPs. Needs no torch.

The paper's 3B model has 36 blocks of width 2560 (arXiv 2511.10628, table of hyper-parameters); its numbers are the
anchors of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod, tau

from luthier.core.errors import ConfigError, did_you_mean

SIZES: dict[str, dict[str, int]] = {
    # The MLP is 2.7 times the width as in the paper, rounded to a multiple of 32. Parameters without the vocabulary:
    "pico": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},  # 0.40 M
    "nano": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},  # 0.80 M
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6},  # 2.66 M
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4},  # 6.43 M
    "3b": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 36, "num_attention_heads": 32},
}


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The integers that fix an Instella model's tensors. ConfigError when the heads do not divide the width."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    """Rows of the embedding matrix, which may exceed the tokenizer's vocabulary."""
    num_key_value_heads: int | None = None
    """None means as many as attention heads, as in the paper."""
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_width(self) -> int:
        return self.head_dim * (self.num_key_value_heads or self.num_attention_heads)


def size_table(size: str) -> dict[str, int]:
    """The entry of SIZES, as keyword arguments of `Dimensions` and `InstellaConfig`; ConfigError for another name."""
    if size not in SIZES:
        raise ConfigError(
            f"unknown model size {size!r}{did_you_mean(size, SIZES)}", hint=f"choose one of: {', '.join(SIZES)}"
        )
    return dict(SIZES[size])


def check_heads(hidden_size: int, num_attention_heads: int, num_key_value_heads: int | None) -> None:
    """ConfigError unless heads divide the width evenly, head size is even (RoPE pairs) and KV heads divide heads."""
    if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
        raise ConfigError(
            f"hidden_size {hidden_size} cannot be split into {num_attention_heads} heads of equal, even size",
            hint="choose num_attention_heads so that hidden_size is a multiple of 2 * num_attention_heads",
        )
    if num_key_value_heads is not None and num_attention_heads % num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads {num_key_value_heads} does not divide num_attention_heads {num_attention_heads}",
            hint="choose a divisor, or leave it out for one key-value head per attention head",
        )


def block_shapes(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    """Tensor names inside one block and their shapes, matrices as (out, in)."""
    width, inner, key_value = dimensions.hidden_size, dimensions.intermediate_size, dimensions.key_value_width
    return {
        "pre_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (key_value, width),
        "self_attn.v_proj.weight": (key_value, width),
        "self_attn.o_proj.weight": (width, width),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (key_value,),
        "pre_feedforward_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }


def tensor_shapes(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    """Every tensor of a saved model by Hugging Face name, in the order of the forward pass."""
    table = (dimensions.vocab_size, dimensions.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(dimensions.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block_shapes(dimensions).items()}
    shapes["model.norm.weight"] = (dimensions.hidden_size,)
    if not dimensions.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def num_parameters(dimensions: Dimensions) -> int:
    """Exact number of parameters, embeddings included."""
    return sum(prod(shape) for shape in tensor_shapes(dimensions).values())


def num_tensors(dimensions: Dimensions) -> int:
    """Number of stored tensors: 11 per block, the final norm and the embedding matrices."""
    return len(tensor_shapes(dimensions))


def extended_rope_theta(theta: float, length: int, new_length: int) -> float:
    """The RoPE base for a longer context: theta ** (ln(T' / 2π) / ln(T / 2π)), arXiv 2511.10628 (long context).

    The frequency pair whose wavelength equals the context length (in tokens) stays the same one. Chaining two
    extensions equals one.
    """
    return theta ** (log(new_length / tau) / log(length / tau))


def kv_cache_bytes_per_token(dimensions: Dimensions, bytes_per_value: int = 2) -> int:
    """Bytes that one cached token takes in all blocks; `bytes_per_value` is 2 for bfloat16."""
    return dimensions.num_hidden_layers * 2 * dimensions.key_value_width * bytes_per_value


def dense_flops_per_token(dimensions: Dimensions) -> int:
    """Training FLOPs of one token without attention scores: 6 per parameter that is multiplied (not looked up)."""
    looked_up = 0 if dimensions.tie_word_embeddings else dimensions.vocab_size * dimensions.hidden_size
    return 6 * (num_parameters(dimensions) - looked_up)


def attention_flops_per_token(dimensions: Dimensions, sequence_length: int) -> int:
    """Training FLOPs of one token's attention scores, 12·L·d·S: forward and backward, no causal discount."""
    return 12 * dimensions.num_hidden_layers * dimensions.hidden_size * sequence_length


def training_flops_per_token(dimensions: Dimensions, sequence_length: int) -> int:
    """All training FLOPs of one token in a sequence of `sequence_length` tokens; the numerator of MFU."""
    return dense_flops_per_token(dimensions) + attention_flops_per_token(dimensions, sequence_length)
