"""Muon: orthogonal updates for matrices, AdamW for the rest, in one optimizer whose state can be saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.learn.muon import Muon, orthogonalize
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.state import TrainState, load_state, save_state

SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape) * torch.logspace(-1, 0, shape[1])
    values = torch.linalg.svdvals(orthogonalize(update))
    assert 0.6 < values.min() < values.max() < 1.25
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    exact = left @ right
    assert torch.nn.functional.cosine_similarity(orthogonalize(update).flatten(), exact.flatten(), dim=0) > 0.98


def test_the_size_of_an_update_is_that_of_adamw() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 96))
    optimizer = Muon({"weight": weight}, (), **{**SETTINGS, "weight_decay": 0.0})
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    root_mean_square = weight.detach().square().mean().sqrt()
    assert 0.1 * SETTINGS["lr"] < root_mean_square < 0.4 * SETTINGS["lr"]


def test_what_is_no_hidden_matrix_gets_adamw() -> None:
    torch.manual_seed(0)
    names = {"head": torch.randn(5, 3), "scale": torch.randn(3)}
    mine = {name: nn.Parameter(value.clone()) for name, value in names.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in names.items()}
    optimizers = Muon(mine, ["head"], **SETTINGS), torch.optim.AdamW(theirs.values(), **SETTINGS)
    for step in range(5):
        for parameters, optimizer in zip((mine, theirs), optimizers, strict=True):
            for name, parameter in parameters.items():
                parameter.grad = torch.randn(names[name].shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    for name in names:
        torch.testing.assert_close(mine[name], theirs[name])


def test_its_state_is_saved_and_comes_back(tmp_path) -> None:
    def trained(steps: int) -> TrainState:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        weights = Weights(module)
        state = TrainState(weights, Muon(weights.masters, ["1.weight"], **SETTINGS), step=steps)
        for step in range(steps):
            module(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
        return state

    straight, stopped, fresh = trained(3), trained(2), trained(1)
    save_state(stopped, tmp_path / "step-00000002", Ranks())
    load_state(fresh, tmp_path / "step-00000002", Ranks())
    first, second = (fresh.weights.masters[name] for name in ("0.weight", "1.weight"))
    assert torch.equal(
        fresh.optimizer.state[first]["momentum"],
        stopped.optimizer.state[stopped.weights.masters["0.weight"]]["momentum"],
    )
    assert torch.equal(second, stopped.weights.masters["1.weight"])
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module.load_state_dict(fresh.weights.masters)
    for name, parameter in module.named_parameters():
        parameter.data = fresh.weights.masters[name].data
    module(torch.full((1, 3), 3.0)).square().sum().backward()
    for name, parameter in module.named_parameters():
        fresh.weights.masters[name].grad = parameter.grad
    fresh.optimizer.step()
    for name, master in straight.weights.masters.items():
        assert torch.equal(fresh.weights.masters[name], master), name
