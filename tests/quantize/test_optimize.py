"""The two stages on one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import LayerTask, plan_bundles
from luthier.quantize.methods import METHODS
from luthier.quantize.optimize import paroquant
from luthier.quantize.weights import QuantizedWeight


class Memory:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def __len__(self) -> int:
        return len(self.hidden)

    def read(self, start: int, stop: int) -> Tensor:
        return self.hidden[start:stop]


class Block(nn.Module):
    """Residual SwiGLU with correlated inputs, and one channel of each matrix an outlier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        with torch.no_grad():
            self.gate_proj.weight[:, 3] *= 8
            self.down_proj.weight[:, 5] *= 8

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


def make_task(log: list[Mapping[str, Any]] | None = None, **settings: Any) -> LayerTask:
    settings = {
        "group_size": 32,
        "bits": 3,
        "rounds": 4,
        "batch_size": 4,
        "epochs": (3, 3),
        "precision": "fp32",
        **settings,
    }
    config = QuantizeConfig(model="m", **settings)
    layer = Block().eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(24, 10, 32, generator=draw) @ torch.randn(32, 32, generator=draw) / 5
    target = layer(hidden)
    return LayerTask(
        index=0,
        layer=layer,
        bundles=plan_bundles(layer, hidden[:1], {}, config),
        inputs=Memory(hidden[:16]),
        targets=Memory(target[:16]),
        validation_inputs=Memory(hidden[16:]),
        validation_targets=Memory(target[16:]),
        arguments={},
        config=config,
        log=lambda row: None if log is None else log.append(row),
    )


def error(task: LayerTask, found: Mapping[str, QuantizedWeight]) -> float:
    weights = {f"{name}.weight": weight.dequantized() for name, weight in found.items()}
    inputs, targets = task.validation_inputs, task.validation_targets
    difference = task.forward(inputs.read(0, len(inputs)), weights) - targets.read(0, len(targets))
    return float(difference.square().mean())


@pytest.mark.parametrize("settings", [{}, {"share": False}, {"start": "rtn"}])
def test_each_stage_lowers_the_error(settings: dict[str, Any]) -> None:
    log: list[Mapping[str, Any]] = []
    task = make_task(log, **settings)
    found = paroquant(task)
    row = log[-1]
    assert row["loss_stage1"] < row["loss_rounded"]
    assert row["loss_stage2"] < row["loss_fixed"]
    assert row["loss_stage2"] < 0.7 * row["loss_rounded"]
    assert 0.5 * error(task, found) == pytest.approx(row["loss_stage2"], rel=0.05)  # smooth L1 of small errors


def test_the_published_settings_run_and_learn() -> None:
    log: list[Mapping[str, Any]] = []
    paper = {"scale_parameter": "linear", "scale_start": "ones", "start": "rtn", "weight_basis": "original"}
    paroquant(make_task(log, guard=False, learning_rate_weight=1e-3, learning_rate_grid=1e-4, **paper))
    assert log[-1]["loss_stage2"] < 0.9 * log[-1]["loss_rounded"]


def test_without_scales_only_angles_turn() -> None:
    found = paroquant(make_task(scale_parameter="none", scale_start="ones"))
    assert all(bool((weight.channel_scales == 1).all()) and bool(weight.theta.any()) for weight in found.values())


def test_with_neither_scales_nor_rounds_stage_one_has_nothing_to_do() -> None:
    log: list[Mapping[str, Any]] = []
    paroquant(make_task(log, rounds=0, scale_parameter="none", scale_start="ones"))
    assert log[-1]["loss_stage1"] == log[-1]["loss_rounded"]
    assert log[-1]["loss_stage2"] < log[-1]["loss_rounded"]


def test_the_full_method_beats_every_baseline() -> None:
    errors = {name: error(make_task(), method(make_task())) for name, method in METHODS.items()}
    assert errors["paroquant"] <= errors["rotated-gptq"] < 0.7 * min(errors["gptq"], errors["awq"]), errors
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def test_micro_batches_do_not_change_the_result() -> None:
    whole, parts = paroquant(make_task(micro_batch_size=4)), paroquant(make_task(micro_batch_size=3))
    for name in whole:
        torch.testing.assert_close(whole[name].theta, parts[name].theta, rtol=1e-2, atol=1e-3)
        assert float((whole[name].codes == parts[name].codes).float().mean()) > 0.99


def test_the_same_settings_give_the_same_bits() -> None:
    first, second = paroquant(make_task()), paroquant(make_task())
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)
    assert all(torch.equal(first[name].theta, second[name].theta) for name in first)


def test_a_rate_that_diverges_is_lowered_and_never_makes_it_worse() -> None:
    log: list[Mapping[str, Any]] = []
    paroquant(make_task(log, learning_rate_transform=5.0, learning_rate_weight=50.0))
    assert any("restarts_stage2" in row for row in log)
    assert log[-1]["loss_stage1"] <= log[-1]["loss_rounded"]
    assert log[-1]["loss_stage2"] <= log[-1]["loss_fixed"]


def test_a_model_that_overflows_is_named() -> None:
    task = make_task()
    task.validation_inputs.read(0, 1)[0, 0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="layer 0: the loss before stage 1 is"):
        paroquant(task)


def test_only_the_layer_is_untouched() -> None:
    task = make_task()
    before = {name: value.clone() for name, value in task.layer.state_dict().items()}
    paroquant(task)
    assert all(torch.equal(before[name], value) for name, value in task.layer.state_dict().items())
