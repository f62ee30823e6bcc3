from __future__ import annotations

import pytest
import torch

from luthier.learn.meters import PEAK_FLOPS, Meter, measured_flops, peak_flops, training_flops_per_token
from luthier.models.arithmetic import training_flops_per_token as by_arithmetic
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig


def test_meter_reports_rates_since_the_last_reading():
    meter = Meter(flops_per_token=100.0, peak=10_000.0)
    meter.add(20, 1.0)
    meter.add(30, 1.0)
    assert meter.read() == {"tokens_per_second": 25.0, "mfu": 0.25}
    meter.add(10, 2.0)
    assert meter.read()["tokens_per_second"] == 5.0


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_built_model_equal_the_arithmetic(tied):
    config = InstellaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = InstellaForCausalLM(config)
    assert training_flops_per_token(model, 16) == by_arithmetic(config.dimensions, 16)


def test_measured_flops_are_a_plausible_speed():
    assert 1e8 < measured_flops(torch.device("cpu"), torch.float32, size=128, repeats=2) < 1e14


def test_every_listed_device_is_found_by_its_name(monkeypatch):
    """The first part that fits wins, so a longer name must stand before a shorter one inside it."""
    for part, peak in PEAK_FLOPS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, part=part: f"NVIDIA {part}")
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
