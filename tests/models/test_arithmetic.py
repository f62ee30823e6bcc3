"""The paper's numbers, the named sizes, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from luthier.core.errors import ConfigError
from luthier.models.arithmetic import (
    SIZES,
    Dimensions,
    attention_flops_per_token,
    block_shapes,
    dense_flops_per_token,
    extended_rope_theta,
    kv_cache_bytes_per_token,
    num_parameters,
    num_tensors,
    size_table,
    tensor_shapes,
    training_flops_per_token,
)

PAPER = Dimensions(vocab_size=50304, **SIZES["3b"])


def test_parameter_count_of_the_paper() -> None:
    assert num_parameters(PAPER) == 3_112_675_840
    assert num_tensors(PAPER) == 36 * 11 + 3 == 399
    assert 2 * num_parameters(PAPER) == 6_225_351_680


def test_block_of_the_paper() -> None:
    shapes = block_shapes(PAPER)
    matrices = {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}
    assert sum(size for name, size in matrices.items() if "attn" in name) == 26_214_400
    assert sum(size for name, size in matrices.items() if "mlp" in name) == 53_084_160
    assert sum(shape[0] for shape in shapes.values() if len(shape) == 1) == 10_240


def test_memory_and_compute_of_the_paper() -> None:
    assert kv_cache_bytes_per_token(PAPER) == 368_640
    assert kv_cache_bytes_per_token(PAPER) * 131_072 == 45 * 2**30
    assert dense_flops_per_token(PAPER) == 6 * 2_983_897_600
    assert attention_flops_per_token(PAPER, 4096) == pytest.approx(4.53e9, rel=1e-3)
    assert attention_flops_per_token(PAPER, 65_536) == pytest.approx(72.5e9, rel=1e-3)
    assert attention_flops_per_token(PAPER, 262_144) == pytest.approx(290e9, rel=1e-3)
    assert training_flops_per_token(PAPER, 4096) == pytest.approx(22.4e9, rel=2e-3)


@pytest.mark.parametrize(("size", "body"), [("nano", 804_992), ("tiny", 2_659_008), ("small", 6_430_976)])
def test_laptop_sizes(size: str, body: int) -> None:
    dimensions = Dimensions(vocab_size=1000, **SIZES[size])
    assert num_parameters(dimensions) - 2 * 1000 * dimensions.hidden_size == body
    assert dimensions.head_dim in (32, 64)


@pytest.mark.parametrize("size", SIZES)
def test_mlp_is_2_7_times_the_width(size: str) -> None:
    table = SIZES[size]
    assert table["intermediate_size"] == round(2.7 * table["hidden_size"] / 32) * 32


def test_grouped_heads_and_tying_shrink_the_model() -> None:
    grouped = Dimensions(vocab_size=1000, num_key_value_heads=2, tie_word_embeddings=True, **SIZES["nano"])
    shapes = tensor_shapes(grouped)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_norm.weight"] == (64,)
    assert "lm_head.weight" not in shapes
    assert kv_cache_bytes_per_token(grouped, bytes_per_value=4) == 4 * 2 * 64 * 4
    assert dense_flops_per_token(grouped) == 6 * num_parameters(grouped), "a tied table is multiplied, too"


def test_unknown_size_suggests_a_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nano'"):
        size_table("nanno")


@pytest.mark.parametrize(("heads", "key_value_heads"), [(3, None), (128, None), (4, 3)])
def test_impossible_heads_are_refused(heads: int, key_value_heads: int | None) -> None:
    with pytest.raises(ConfigError):
        Dimensions(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=1,
            vocab_size=10,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
        )


def test_arithmetic_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, luthier.models, luthier.models.arithmetic, luthier.models.register; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("length", "new_length", "theta"),
    [
        (4096, 65_536, 514_640.3),
        (4096, 262_144, 3_691_949.2),
        (4096, 8192, 26_784),
        (4096, 16_384, 71_738),
        (4096, 32_768, 192_144),
        (4096, 131_072, 1_378_414),
        (128, 256, 83_149),
        (128, 512, 691_374),
        (256, 1024, 313_145),
        (256, 2048, 1_752_339),
    ],
)
def test_rope_base_law(length: int, new_length: int, theta: float) -> None:
    assert extended_rope_theta(10_000, length, new_length) == pytest.approx(theta, abs=0.6)
    halfway = extended_rope_theta(10_000, length, 2 * length)
    assert extended_rope_theta(halfway, 2 * length, new_length) == pytest.approx(theta, abs=0.6)
