from __future__ import annotations

import pytest

from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.quantize.config import PRESETS, QuantizeConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_known_fields_to_valid_values(preset: str) -> None:
    config = build(QuantizeConfig, {"model": "m", "preset": preset})
    for key, value in PRESETS[preset].items():
        assert getattr(config, key) == value


def test_the_defaults_are_the_preset_quick() -> None:
    """So that QuantizeConfig() in Python is the same as `luthier quantize`."""
    assert build(QuantizeConfig, {"model": "m"}) == QuantizeConfig(model="m")


def test_paper_is_the_published_recipe() -> None:
    config = build(QuantizeConfig, {"model": "m", "preset": "paper"})
    assert (config.bits, config.group_size, config.rounds, config.pairing) == (4, 128, 8, "random")
    assert (config.epochs, config.batch_size, config.samples, config.sequence_length) == ((10, 10), 16, 2048, 2048)
    assert (config.learning_rate_transform, config.learning_rate_weight, config.learning_rate_grid) == (
        0.05,
        1e-5,
        1e-6,
    )
    assert (config.weight_decay, config.betas, config.loss) == (0.01, (0.9, 0.95), "smooth-l1")
    assert (config.scale_parameter, config.scale_start, config.start, config.weight_basis) == (
        "linear",
        "ones",
        "rtn",
        "original",
    )
    assert not config.guard
    assert not config.share
    assert config.warmup == 0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"bits": 5}, "bits: got 5, expected one of 2, 3, 4, 8"),
        ({"group_size": 100}, "group_size: got 100, expected one of 32, 64, 128"),
        ({"rounds": 17}, "rounds: got 17, expected 0 to 16"),
        ({"samples": 0}, "samples: got 0, expected 1 or more"),
        ({"learning_rate_weight": float("nan")}, "learning_rate_weight: got nan"),
        ({"epochs": (-1, 2)}, r"epochs: got \(-1, 2\)"),
        ({"scale_parameter": "none"}, "no scales to search"),
        ({"start": "gptq", "weight_basis": "original"}, "codes live in the rotated basis"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        QuantizeConfig(model="m", **values)  # type: ignore[arg-type]
