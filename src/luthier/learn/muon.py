"""Muon: momentum made orthogonal (Keller Jordan, 2024), sized so that it trains whole models (arXiv 2502.16982).

The update of a hidden matrix is its Nesterov momentum with all singular values brought near 1 by five Newton-Schulz
steps, times 0.2 √max(rows, columns), which is about the size of an AdamW update: one learning rate serves both.
Embedding, head and vectors get AdamW.

Departure from `torch.optim.Muon`, which takes matrices only and computes in bf16 whatever the device: here one
optimizer holds all parameters, and a CPU computes in fp32, where bf16 may be far slower. A sharded matrix is gathered
for its update, on every rank alike, so the number of ranks changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # each maps a singular value s to a s + b s³ + c s⁵


def orthogonalize(update: Tensor) -> Tensor:
    """A matrix with the singular vectors of `update` and singular values between about 0.7 and 1.2."""
    wide = update.T if update.shape[0] > update.shape[1] else update
    x = wide.to(torch.bfloat16 if wide.is_cuda else torch.float32)
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if update.shape[0] > update.shape[1] else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices [rows, columns], AdamW for everything else; decoupled weight decay on both."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        outside: Collection[str],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """outside: names of the matrices that get AdamW: embedding and head. betas, eps: of AdamW."""
        by_muon = {name: p.ndim == 2 and name not in outside for name, p in parameters.items()}
        groups = [
            {"params": [p for name, p in parameters.items() if by_muon[name] == muon], "muon": muon}
            for muon in (True, False)
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._step_matrix if group["muon"] else self._step_adamw
                    update(parameter, parameter.grad, group)

    def _step_matrix(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state(weight, "momentum")
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM)  # Nesterov
        if isinstance(update, DTensor):
            direction: Tensor = orthogonalize(update.full_tensor())
            direction = distribute_tensor(direction, update.device_mesh, update.placements, src_data_rank=None)
        else:
            direction = orthogonalize(update)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(direction, alpha=group["lr"] * 0.2 * max(weight.shape) ** 0.5)

    def _step_adamw(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state(weight, "exp_avg", "exp_avg_sq")
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**step))

    def _state(self, weight: Tensor, *names: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state.update({name: torch.zeros_like(weight) for name in names})
        return state
