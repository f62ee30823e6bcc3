"""Starting weights: the paper's deviations, independent of order, wrappers and world size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from luthier.models.arithmetic import SIZES, Dimensions
from luthier.models.initialization import initial_weight, initialize, standard_deviation
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

PAPER = Dimensions(vocab_size=50304, **SIZES["3b"])
CONFIG = InstellaConfig(vocab_size=301, **SIZES["nano"])


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("model.embed_tokens.weight", 0.019764),
        ("lm_head.weight", 0.019764),
        ("model.layers.7.self_attn.q_proj.weight", 0.019764),
        ("model.layers.7.mlp.gate_proj.weight", 0.019764),
        ("model.layers.0.self_attn.o_proj.weight", (2 * 2560) ** -0.5),
        ("model.layers.35.self_attn.o_proj.weight", (2 * 2560 * 36) ** -0.5),
        ("model.layers.0.mlp.down_proj.weight", (2 * 6912) ** -0.5),
        ("model.layers.11.mlp.down_proj.weight", (2 * 6912 * 12) ** -0.5),
    ],
)
def test_standard_deviations_of_the_paper(name: str, sigma: float) -> None:
    assert standard_deviation(name, PAPER) == pytest.approx(sigma, abs=5e-7)


def test_norm_scales_have_no_deviation() -> None:
    names = (
        "model.norm.weight",
        "model.layers.3.self_attn.q_norm.weight",
        "model.layers.3.pre_attention_layernorm.weight",
    )
    assert [standard_deviation(name, PAPER) for name in names] == [None] * 3


def test_weights_are_normal_and_cut_at_three_deviations() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = initial_weight(name, torch.Size((512, 512)), CONFIG.dimensions, seed=1)
    sigma = standard_deviation(name, CONFIG.dimensions)
    assert sigma is not None
    assert weight.abs().max() <= 3 * sigma
    assert (weight.abs() > 2.9 * sigma).any(), "the cut is not below three deviations"
    # A normal cut at ±3σ has 0.98658 of the deviation; cutting does not rescale.
    assert weight.std().item() == pytest.approx(0.98658 * sigma, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=0.01 * sigma)


def test_seed_and_name_alone_decide_the_weights() -> None:
    model, other, changed = (InstellaForCausalLM(CONFIG) for _ in range(3))
    initialize(model, seed=5)
    torch.rand(3)  # the global generator plays no part
    initialize(other, seed=5)
    initialize(changed, seed=6)
    state, again, different = model.state_dict(), other.state_dict(), changed.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    matrices = [name for name in state if state[name].ndim == 2]
    assert not any(torch.equal(state[name], different[name]) for name in matrices)
    assert not torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"])


def test_names_inserted_by_compile_do_not_change_the_weights() -> None:
    model, wrapped = InstellaForCausalLM(CONFIG), InstellaForCausalLM(CONFIG)
    initialize(model, seed=5)
    for number, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[number] = torch.compile(layer, backend="eager")  # type: ignore[call-overload]
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    initialize(wrapped, seed=5)
    for (_, parameter), (name, plain) in zip(wrapped.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter, plain), name


@pytest.fixture
def last_rank_of_three() -> Iterator[None]:
    dist.init_process_group("fake", rank=2, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("last_rank_of_three")
def test_a_sharded_meta_model_gets_its_part_of_the_same_weights() -> None:
    whole = InstellaForCausalLM(CONFIG)
    initialize(whole, seed=5)
    with torch.device("meta"):
        sharded = InstellaForCausalLM(CONFIG)
    mesh = init_device_mesh("cpu", (3,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")
    initialize(sharded, seed=5)

    for (name, part), (_, full) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        assert isinstance(part, DTensor)
        assert torch.equal(part.to_local(), full.chunk(3)[2]), name
    assert torch.equal(sharded.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
