"""Which matrices of a layer are quantized, and which share a transform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import Bundle, Part, layer_output, plan_bundles


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        return self.o_proj(self.q_proj(x) * keys)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bth,eih->ebti", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebti,ehi->bth", gate * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.experts = nn.LayerNorm(8), Attention(), Experts()

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        hidden = hidden + scale * self.attention(self.norm(hidden))
        return hidden + self.experts(hidden), None


def config(**settings: object) -> QuantizeConfig:
    return QuantizeConfig(model="m", **settings)  # type: ignore[arg-type]


def names(bundles: tuple[Bundle, ...]) -> list[list[str]]:
    return [[part.name.split(".")[-1] for part in bundle.parts] for bundle in bundles]


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


def test_matrices_with_one_input_share_a_bundle(hidden: Tensor) -> None:
    bundles = plan_bundles(Layer(), hidden, {}, config())
    assert names(bundles) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]] or names(
        bundles
    ) == [["k_proj", "v_proj", "q_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    assert [bundle.in_features for bundle in bundles] == [8, 8, 8, 6]


def test_without_sharing_each_matrix_stands_alone_but_experts_share(hidden: Tensor) -> None:
    bundles = plan_bundles(Layer(), hidden, {}, config(share=False))
    assert sorted(map(len, names(bundles))) == [1] * 6
    assert bundles[-1].parts[0].rows == 24


def test_skipped_modules_are_left_out(hidden: Tensor) -> None:
    found = names(plan_bundles(Layer(), hidden, {}, config(skip=("*k_proj", "experts.*"))))
    assert sorted(name for bundle in found for name in bundle) == ["o_proj", "q_proj", "v_proj"]
    with pytest.raises(CheckpointError, match="no linear module"):
        plan_bundles(Layer(), hidden, {}, config(skip=("*",)))


def test_stack_and_split_are_inverse(hidden: Tensor) -> None:
    layer = Layer()
    parameters = dict(layer.named_parameters())
    for bundle in plan_bundles(layer, hidden, {}, config()):
        stacked = bundle.stack(parameters)
        assert stacked.shape == (sum(part.rows for part in bundle.parts), bundle.in_features)
        for name, value in bundle.split(stacked).items():
            assert torch.equal(value, parameters[name])


def test_replaced_weights_and_arguments_reach_the_layer(hidden: Tensor) -> None:
    layer = Layer()
    plain = layer_output(layer, hidden, {})
    assert torch.equal(plain, layer(hidden)[0])
    silent = layer_output(layer, hidden, {"scale": 0.0})
    zero = {"attention.o_proj.weight": torch.zeros(8, 8), "attention.o_proj.bias": torch.zeros(8)}
    torch.testing.assert_close(layer_output(layer, hidden, {}, zero), silent)
    assert not torch.equal(plain, silent)


def test_a_part_is_named_after_its_module() -> None:
    assert Part("self_attn.q_proj.weight", (4, 8)).name == "self_attn.q_proj"
    assert Part("mlp.experts.down_proj", (3, 8, 6)).name == "mlp.experts.down_proj"


def test_transposed_experts_are_refused_unless_they_are_skipped(hidden: Tensor) -> None:
    layer = Layer()
    layer.experts.is_transposed = True
    with pytest.raises(CheckpointError, match="experts are stored as"):
        plan_bundles(layer, hidden, {}, config())
    assert len(names(plan_bundles(layer, hidden, {}, config(skip=("*experts*",))))) == 2
