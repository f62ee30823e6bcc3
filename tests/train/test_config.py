from __future__ import annotations

import dataclasses
import typing

import pytest

from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.models.arithmetic import SIZES
from luthier.train.config import SIZE_PRESETS, VOCABULARIES, PretrainConfig, Size


def test_every_size_has_a_preset_and_a_model() -> None:
    assert set(SIZE_PRESETS) == set(VOCABULARIES) == set(SIZES) == set(typing.get_args(Size))


@pytest.mark.parametrize("size", SIZE_PRESETS)
def test_a_preset_sets_known_fields_to_valid_values(size: str) -> None:
    config = build(PretrainConfig, {"size": size})
    assert {key: getattr(config, key) for key in SIZE_PRESETS[size]} == SIZE_PRESETS[size]


def test_the_defaults_are_the_preset_of_the_default_size() -> None:
    """So that PretrainConfig() in Python is the same as `luthier pretrain`."""
    assert build(PretrainConfig, {}) == PretrainConfig()


def test_what_is_stored_says_the_size_that_was_used() -> None:
    assert (PretrainConfig().size, PretrainConfig().vocab_size) == ("tiny", 4096)
    assert PretrainConfig(size="nano").vocab_size == 2048
    assert PretrainConfig(size="nano", vocab_size=300).vocab_size == 300
    assert (PretrainConfig(start="s").size, PretrainConfig(start="s").vocab_size) == ("auto", 0)


def test_3b_is_stage_one_of_the_paper() -> None:
    config = build(PretrainConfig, {"size": "3b"})
    assert config.steps * config.batch_size * config.sequence_length == 4_064_997_801_984  # 4.065 T tokens
    assert (config.learning_rate, config.betas, config.optimizer) == (4e-4, (0.9, 0.95), "adamw")
    assert (config.weight_decay, config.grad_clip, config.final_fraction) == (0.1, 1.0, 0.1)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, "steps: got 0, expected more than 0"),
        ({"learning_rate": -1}, "learning_rate: got -1.0, expected more than 0"),
        ({"batch_size": -2}, "batch_size: got -2"),
        ({"grad_clip": -1}, "grad_clip: got -1.0, expected 0 or more"),
        ({"eval_every": -1}, "eval_every: got -1, expected 0 or more"),
        ({"betas": [0.9, 1]}, "betas: got"),
        ({"document_mask": True, "attention": "flash_attention_2"}, "document_mask: flash_attention_2 cannot"),
        ({"held_out": 1}, "held_out: got 1.0, which leaves one part empty"),
        ({"held_out": 1.5}, "held_out: got 1.5, expected 0 to 1"),
        ({"learning_rate": float("nan")}, "learning_rate: got float nan"),
        ({"data": []}, "data: got no corpus"),
        ({"data": ["a", "b"], "weights": [1]}, "weights: got 1 for 2 corpora"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps: got 6, more than the 5 steps"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(PretrainConfig, values)


def test_what_may_change_on_resume_exists_and_leaves_the_result_alone() -> None:
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert set(PretrainConfig.RESUMABLE_CHANGES) <= names
    assert not set(PretrainConfig.RESUMABLE_CHANGES) & {"steps", "seed", "data", "batch_size", "learning_rate", "size"}
