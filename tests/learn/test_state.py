from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.core.errors import CheckpointError
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.state import TrainState, inherit_state, load_state, save_state


def trained_state() -> TrainState:
    """Two updates of a module one of whose parameters never gets a gradient."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    weights = Weights(module)
    state = TrainState(weights, torch.optim.AdamW(weights.masters.values(), lr=0.1, fused=True), step=2)
    for _ in range(2):
        module["used"](torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
    return state


def test_saving_leaves_the_moments_alone_where_a_parameter_has_none(tmp_path):
    state = trained_state()
    used = state.weights.masters["used.weight"]
    before = {name: value.clone() for name, value in state.optimizer.state[used].items()}
    idle = state.weights.masters["idle.weight"].detach().clone()
    save_state(state, tmp_path / "step-00000002", Ranks())
    for name, value in before.items():
        torch.testing.assert_close(state.optimizer.state[used][name], value, rtol=0, atol=0)
    assert torch.equal(state.weights.masters["idle.weight"], idle)
    assert used.grad is None


def test_a_state_that_was_saved_comes_back(tmp_path):
    saved, fresh = trained_state(), trained_state()
    save_state(saved, tmp_path / "step-00000002", Ranks())
    with torch.no_grad():
        for parameter in fresh.weights.masters.values():
            parameter.zero_()
    fresh.step = 0
    load_state(fresh, tmp_path / "step-00000002", Ranks())
    assert fresh.step == 2
    for name, master in saved.weights.masters.items():
        assert torch.equal(fresh.weights.masters[name], master)
        moments = fresh.optimizer.state[fresh.weights.masters[name]]
        for key, value in saved.optimizer.state[master].items():
            assert torch.equal(moments[key], value), (name, key)


def test_another_run_inherits_weights_and_moments_but_counts_anew(tmp_path):
    parent, child = trained_state(), trained_state()
    parent.cursor = {"step": 2}
    save_state(parent, tmp_path / "step-00000002", Ranks())
    child.step = child.tokens = 0
    child.cursor = {"step": 0}
    for parameter in child.weights.masters.values():
        parameter.data.zero_()
        child.optimizer.state.pop(parameter, None)
    assert inherit_state(child, tmp_path / "step-00000002", Ranks()) == 2
    assert (child.step, child.tokens, child.cursor) == (0, 0, {"step": 0})
    for name, master in parent.weights.masters.items():
        assert torch.equal(child.weights.masters[name], master)
        for key, value in parent.optimizer.state[master].items():
            assert torch.equal(child.optimizer.state[child.weights.masters[name]][key], value), (name, key)
    assert float(child.optimizer.state[child.weights.masters["used.weight"]]["step"]) == 2


def test_a_damaged_state_that_is_inherited_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read this training state") as told:
        inherit_state(trained_state(), tmp_path, Ranks())
    assert "start from another run" in told.value.hint


def test_masters_that_are_inherited_reach_the_rounded_model(tmp_path):
    parent = trained_state()
    save_state(parent, tmp_path / "step-00000002", Ranks())
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    weights = Weights(module, torch.bfloat16)
    child = TrainState(weights, torch.optim.AdamW(weights.masters.values(), lr=0.1, fused=True))
    inherit_state(child, tmp_path / "step-00000002", Ranks())
    for name, parameter in module.named_parameters():
        assert torch.equal(weights.masters[name], parent.weights.masters[name])
        assert torch.equal(parameter, parent.weights.masters[name].bfloat16())
