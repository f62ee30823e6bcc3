from __future__ import annotations

import subprocess
import sys

import pytest

from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.train.config import PretrainConfig
from luthier.train.extend_config import ExtendConfig, new_theta


def settings(**values: object) -> ExtendConfig:
    return build(ExtendConfig, {"start": "model", **values})


@pytest.mark.parametrize(
    ("theta", "length", "longer", "expected"),
    [
        (10_000, 4096, 65_536, 514_640.3),  # § 4.1, phase 1
        (10_000, 4096, 262_144, 3_691_949.2),  # phase 2; their configuration says 3,691,950
        (10_000, 4096, 8192, 26_784),
        (10_000, 4096, 131_072, 1_378_414),
        (10_000, 128, 256, 83_149),
        (10_000, 128, 512, 691_374),
        (10_000, 256, 1024, 313_145),
        (10_000, 4096, 4096, 10_000),
    ],
)
def test_the_law(theta: float, length: int, longer: int, expected: float) -> None:
    assert new_theta(settings(sequence_length=longer), theta, length) == pytest.approx(expected, abs=0.6)


def test_two_phases_reach_the_base_of_one() -> None:
    first = new_theta(settings(sequence_length=65_536), 10_000, 4096)
    second = new_theta(settings(sequence_length=262_144), first, 65_536)
    assert second == pytest.approx(new_theta(settings(sequence_length=262_144), 10_000, 4096), rel=1e-12)


def test_the_base_may_be_kept_or_given_whatever_the_length() -> None:
    assert new_theta(settings(theta="keep", sequence_length=64), 10_000, 4096) == 10_000
    assert new_theta(settings(theta=5e5, sequence_length=64), 10_000, 4096) == 5e5
    assert settings(theta="1e6").theta == 1e6


def test_the_law_may_be_told_which_length_the_base_belongs_to() -> None:
    """A model may read more tokens than it was trained with."""
    told = settings(sequence_length=65_536, trained_length=4096)
    assert new_theta(told, 10_000, 131_072) == pytest.approx(514_640.3, abs=0.6)


def test_the_law_lengthens_only() -> None:
    with pytest.raises(ConfigError, match="sequence_length: got 1024, but the model was trained with 4096 already"):
        new_theta(settings(), 10_000, 4096)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"start": ""}, "start: got nothing"),
        ({"theta": 0.5}, r"theta: got 0\.5, expected more than 1"),
        ({"theta": "laws"}, "theta: got str 'laws', expected one of law, keep or float"),
        ({"theta": "keep", "trained_length": 64}, "trained_length: got 64 with theta keep"),
        ({"trained_length": -1}, "trained_length: got -1"),
        ({"steps": 0}, "steps: got 0, expected more than 0"),  # what pretraining checks is checked here too
        ({"warmup_steps": 200}, "warmup_steps: got 200, more than the 150 steps"),
        ({"attention": "flash_attention_2"}, "flash_attention_2 cannot be told which document"),
        ({"weights": [1, 2]}, "weights: got 2 for 1 corpora"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**values)


def test_the_loop_gets_the_same_settings() -> None:
    config = settings(steps=7, warmup_steps=3, data=["a", "b"], weights=[1, 2], seed=5, optimizer="muon")
    shared = config.as_pretraining()
    assert isinstance(shared, PretrainConfig)
    assert (shared.steps, shared.data, shared.weights, shared.seed) == (7, ("a", "b"), (1.0, 2.0), 5)
    assert (shared.start, shared.document_mask, shared.schedule, shared.optimizer) == ("model", True, "linear", "muon")


def test_the_settings_load_no_torch() -> None:
    code = "import sys, luthier.train.extend_config, luthier.cli.extend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
