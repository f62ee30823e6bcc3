from __future__ import annotations

import torch
from torch import nn

from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.state import TrainState, load_state, save_state


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
