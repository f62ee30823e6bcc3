"""Outliers that change nothing but the weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from luthier.core.errors import CheckpointError
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.quantize.outliers import inject_outliers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    "model",
    [LlamaForCausalLM(LlamaConfig(**SIZES)), InstellaForCausalLM(InstellaConfig(**SIZES))],
    ids=["llama", "instella"],
)
def test_the_function_stays_and_the_weights_change(model: torch.nn.Module) -> None:
    model = model.eval().double()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        largest = model.model.layers[0].mlp.down_proj.weight.abs().max()  # type: ignore[union-attr, index]
        assert inject_outliers(model, factor=16, share=0.05) == 2 * (2 + 2 + 1 + 2)
        torch.testing.assert_close(model(ids).logits, before)
    assert model.model.layers[0].mlp.down_proj.weight.abs().max() > 4 * largest  # type: ignore[union-attr, index]


def test_norms_behind_the_matrices_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Olmo2DecoderLayer"):
        inject_outliers(Olmo2ForCausalLM(Olmo2Config(**SIZES)))
