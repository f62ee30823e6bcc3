"""The baselines: their codes, their scales, and matrices that do not fill their groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.affine import encode, grid
from luthier.quantize.assemble import assemble
from luthier.quantize.baselines import awq, gptq_method, rtn
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import Bundle, LayerTask, Part, plan_bundles
from luthier.quantize.methods import Method


class Memory:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def __len__(self) -> int:
        return len(self.hidden)

    def read(self, start: int, stop: int) -> Tensor:
        return self.hidden[start:stop]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 16, 40)), nn.Parameter(torch.randn(2, 40, 8))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bth,eih->ebti", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebti,ehi->bth", gate * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.experts = nn.Linear(40, 40), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.proj(x))


@pytest.fixture
def task() -> LayerTask:
    torch.manual_seed(0)
    config = QuantizeConfig(model="m", group_size=32, bits=3)
    layer = Layer().requires_grad_(False)
    hidden = torch.randn(8, 12, 40) @ torch.randn(40, 40)
    hidden[..., 4] *= 30
    store = Memory(hidden)
    return LayerTask(
        index=0,
        layer=layer,
        bundles=plan_bundles(layer, hidden[:1], {}, config),
        inputs=store,
        targets=store,
        validation_inputs=store,
        validation_targets=store,
        arguments={},
        config=config,
    )


def loss(task: LayerTask, method: Method, name: str = "proj") -> float:
    x = task.inputs.read(0, 8).flatten(0, 1)
    original = task.layer.get_submodule(name).weight
    return float((x @ (method(task)[name].dequantized() - original).T).square().sum())  # type: ignore[operator]


@pytest.mark.parametrize("method", [rtn, awq, gptq_method])
def test_all_matrices_come_back_in_their_size(task: LayerTask, method: Method) -> None:
    found = method(task)
    assert {name: tuple(weight.dequantized().shape) for name, weight in found.items()} == {
        "proj": (40, 40),
        "experts.gate_up_proj": (32, 40),
        "experts.down_proj": (80, 8),
    }
    assert all(weight.rounds == 0 for weight in found.values())
    assert found["proj"].codes.shape == (40, 64)  # padded to whole groups
    assert int(found["proj"].codes.max()) <= 7


def test_rounding_is_the_quantizer_itself(task: LayerTask) -> None:
    weight = nn.functional.pad(task.layer.get_submodule("proj").weight, (0, 24)).view(40, 2, 32)  # type: ignore[arg-type]
    step, zero = grid(weight, 3)
    codes, points = encode(weight, step.half().float(), zero, 3)
    found = rtn(task)["proj"]
    assert torch.equal(found.codes, codes.flatten(1))
    assert torch.equal(found.points, points[..., 0])


def test_data_helps_where_inputs_are_uneven(task: LayerTask) -> None:
    nearest = loss(task, rtn)
    assert loss(task, awq) < 0.5 * nearest
    assert loss(task, gptq_method) < 0.5 * nearest


def test_scales_of_awq_cancel_exactly(task: LayerTask) -> None:
    """With codes fine enough, scaled weights and activations give the original back."""
    fine = LayerTask(**{**vars(task), "config": QuantizeConfig(model="m", group_size=32, bits=8)})
    found = awq(fine)["proj"]
    assert bool((found.channel_scales != 1).any())
    original = task.layer.get_submodule("proj").weight
    assert float((found.dequantized() - original).norm() / original.norm()) < 0.01  # type: ignore[arg-type, operator]


def test_numbers_that_no_file_can_hold_are_named() -> None:
    bundle = Bundle((Part("q.weight", (2, 32)),))
    with pytest.raises(CheckpointError, match="q: channel_scales are not finite in fp16"):
        assemble(
            bundle,
            codes=torch.zeros(2, 32),
            points=torch.zeros(2, 1),
            steps=torch.ones(2, 1),
            channel_scales=torch.full((32,), 1e6),
            config=QuantizeConfig(model="m", group_size=32),
        )
