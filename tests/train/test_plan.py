from __future__ import annotations

import pytest

from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.train.config import PretrainConfig
from luthier.train.plan import DEVICES, activation_bytes, dimensions, hour_rows, plan_rows


def plan(**values: object) -> PretrainConfig:
    return build(PretrainConfig, values)


def test_the_paper_model() -> None:
    rows = dict(plan_rows(plan(size="3b")))
    assert rows["parameters"] == "3,112,675,840"
    assert rows["tokens"] == "4,064,997,801,984"
    assert rows["tokens per step"] == "4,194,304"
    assert rows["weights in bf16"] == "5.80 GiB"
    # 6 FLOPs per multiplied parameter, and 12·L·d·S for attention scores
    dense, attention = 6 * (3_112_675_840 - 50304 * 2560), 12 * 36 * 2560 * 4096
    assert rows["training FLOPs per token"].startswith(f"{dense + attention:.3g} ")


def test_hours_fall_with_devices_and_rise_with_steps() -> None:
    def hours(config: PretrainConfig) -> dict[str, list[float]]:
        return {name: [float(value.replace(",", "")) for value in row] for name, *row in hour_rows(config)}

    one, two = hours(plan(size="3b")), hours(plan(size="3b", steps=2 * 969_171))
    assert list(one) == list(DEVICES)
    first = one["H100"]
    assert first[0] / first[3] == pytest.approx(128, rel=1e-3)
    assert two["H100"][0] == pytest.approx(2 * first[0], rel=1e-6)
    flops = 4_064_997_801_984 * (6 * (3_112_675_840 - 50304 * 2560) + 12 * 36 * 2560 * 4096)
    assert first[0] == pytest.approx(flops / (0.4 * 989e12) / 3600, rel=1e-6)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing() -> None:
    small, large = plan(size="nano"), plan(size="nano", micro_batch_size=16)
    size = dimensions(small)
    assert activation_bytes(large, size) == 2 * activation_bytes(small, size)
    saving = plan(size="nano", activation_checkpointing=True)
    assert activation_bytes(saving, size) < activation_bytes(small, size) / 8


def test_another_architecture_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="another architecture"):
        plan_rows(plan(model="some/model"))
