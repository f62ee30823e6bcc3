"""Configurations: the paper's defaults, RoPE settings old and new, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import ConfigError
from luthier.models.arithmetic import SIZES, num_parameters
from luthier.models.instella_config import InstellaConfig, sized_config

RELEASED = {
    "architectures": ["InstellaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "modeling_instella.InstellaConfig",
        "AutoModelForCausalLM": "modeling_instella.InstellaForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "instella",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 32,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0",
    "use_cache": True,
    "vocab_size": 50304,
}


def test_defaults_are_the_released_model() -> None:
    default = InstellaConfig()
    for name, value in RELEASED.items():
        if name not in ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version"):
            assert default.to_dict()[name] == value, name
    assert num_parameters(default.dimensions) == 3_112_675_840


def test_old_rope_settings_are_read_and_both_forms_written(tmp_path: Path) -> None:
    config = InstellaConfig.from_dict({**RELEASED, "rope_theta": 3_691_950.0})
    assert config.rope == {"rope_type": "default", "rope_theta": 3_691_950.0}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 3_691_950.0
    assert written["rope_scaling"] is None
    assert "auto_map" not in written, "no remote file ships with an exported folder"
    assert InstellaConfig.from_pretrained(tmp_path).rope == config.rope


def test_scaled_rope_survives_both_forms(tmp_path: Path) -> None:
    config = InstellaConfig.from_dict({**RELEASED, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope["rope_type"] == "linear"
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"]["type"] == "linear"
    assert written["rope_scaling"]["factor"] == 2.0
    for form in ("rope_parameters", "rope_scaling"):
        old_reader = {name: value for name, value in written.items() if name != form}
        again = InstellaConfig.from_dict(old_reader).rope
        assert (again["rope_type"], again["factor"], again["rope_theta"]) == ("linear", 2.0, 10000.0)


def test_sized_config_takes_highest_id_and_special_tokens_from_the_tokenizer() -> None:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 4}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )
    config = sized_config("tiny", tokenizer, max_position_embeddings=256)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (5, 0, 1, 1)
    assert (config.hidden_size, config.max_position_embeddings) == (SIZES["tiny"]["hidden_size"], 256)


def test_biases_and_uneven_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="no biases"):
        InstellaConfig(attention_bias=True)
    with pytest.raises(ConfigError, match="cannot be split"):
        InstellaConfig(num_attention_heads=33)
