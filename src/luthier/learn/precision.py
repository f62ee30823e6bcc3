"""Mixed precision as in the paper's trainer: parameters and compute in bf16, gradients and master weights in fp32.

One process does by hand what FSDP2's MixedPrecisionPolicy does for many: gradients of each micro-batch are added up in
fp32, the optimizer updates fp32 masters, and the model receives rounded copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Weights:
    """The fp32 parameters that the optimizer and checkpoints see, by name.

    `low=None`: the module itself holds them. With a dtype, the module is converted to it and the masters live here.
    """

    def __init__(self, module: nn.Module, low: torch.dtype | None = None) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        if low is None:
            self.masters = dict(named)
            return
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in named}
        for _, parameter in named:
            parameter.data = parameter.data.to(low)
        self._copies = [(self.masters[name], parameter) for name, parameter in named]

    def collect(self) -> None:
        """Move the gradients of one micro-batch to the masters."""
        for master, copy in self._copies:
            if copy.grad is not None:
                gradient: Tensor = copy.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                copy.grad = None

    def restore(self) -> None:
        """Put the masters themselves into the module, which is then fp32: to measure and save what was learned."""
        for master, copy in self._copies:
            copy.data = master.data
        self._copies = []

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the current masters, rounded."""
        if self._copies:
            torch._foreach_copy_([copy for _, copy in self._copies], [master for master, _ in self._copies])
