"""The experts of a mixture with quantized weights, in place of transformers' fused module.

All experts share one transform for gate and up and one for down, so tokens are rotated once, before the experts part
them. Buffers are named as in checkpoints: `{e}.gate_proj.qweight`, `gate_up_weight_theta`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.kernels.cpu import Stored
from luthier.quantize.kernels.dispatch import Runner
from luthier.quantize.tensors import (
    EXPERT_PARTS,
    expected,
    from_tensors,
    to_tensors,
)
from luthier.quantize.weights import QuantizedWeight

BLOCK = "experts"  # a name that `tensors` recognises; removed from the buffers' names


class RotatedExperts(nn.Module):
    """Tokens (n, hidden), chosen experts (n, k) and their weights (n, k) → (n, hidden): a gated network per expert.

    shapes: rows of all experts and input channels of gate_up_proj and down_proj.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        num_experts: int,
        act_fn: Callable[[Tensor], Tensor],
        *,
        bits: int,
        group_size: int,
        rounds: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shapes, self.num_experts, self.act_fn = shapes, num_experts, act_fn
        self.bits, self.group_size, self.rounds, self.dtype = bits, group_size, rounds, dtype
        for stack, (rows, in_features) in shapes.items():
            headers = expected(
                f"{BLOCK}.{stack}",
                out_features=rows,
                in_features=in_features,
                bits=bits,
                group_size=group_size,
                rounds=rounds,
                experts=num_experts,
            )
            for name, (kind, shape) in headers.items():
                self._put(name, torch.zeros(shape, dtype=kind, device=device))
        self._runners: dict[tuple[str, int, torch.dtype], Runner] = {}

    @classmethod
    def like(cls, module: nn.Module, *, dtype: torch.dtype, bits: int, group_size: int, rounds: int) -> RotatedExperts:
        """Empty experts in the shape of transformers' fused ones. CheckpointError for another form of experts."""
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        act_fn: Any = getattr(module, "act_fn", None)
        known = act_fn is not None and not hasattr(module, "gate_up_proj_bias")
        if not (known and isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == 3):
            raise CheckpointError(
                f"{type(module).__name__}: experts of a form that cannot be quantized",
                hint="only fused gated experts without bias can: gate_up_proj, down_proj and act_fn",
            )
        shapes = {"gate_up_proj": _stacked(gate_up), "down_proj": _stacked(down)}
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "rounds": rounds, "dtype": dtype}
        return cls(shapes, len(gate_up), act_fn, device=gate_up.device, **settings)

    @classmethod
    def from_weights(
        cls,
        weights: dict[str, QuantizedWeight],
        num_experts: int,
        act_fn: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> RotatedExperts:
        """The experts of stacked matrices `gate_up_proj` and `down_proj`."""
        first = weights["gate_up_proj"]
        module = cls(
            {name: (weight.codes.shape[0], weight.in_features) for name, weight in weights.items()},
            num_experts,
            act_fn,
            bits=first.bits,
            group_size=first.group_size,
            rounds=first.rounds,
            dtype=dtype,
        )
        for stack, weight in weights.items():
            for name, tensor in to_tensors(f"{BLOCK}.{stack}", weight, num_experts).items():
                module._put(name, tensor)
        return module

    def _put(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor under its name in checkpoints."""
        *path, last = name.removeprefix(f"{BLOCK}.").split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(last, tensor)

    def quantized_weight(self, stack: str) -> QuantizedWeight:
        """The stacked matrices gate_up_proj or down_proj of all experts, unpacked."""
        tensors = {f"{BLOCK}.{name}": tensor for name, tensor in self.named_buffers()}
        rows, in_features = self.shapes[stack]
        return from_tensors(f"{BLOCK}.{stack}", tensors, rows, in_features, self.bits, self.group_size)

    def runners(self, dtype: torch.dtype) -> list[Runner]:
        """The kernels of all experts, made at the first call; first all of gate and up, then all of down."""
        return [self._runner(stack, e, dtype) for stack in self.shapes for e in range(self.num_experts)]

    def _runner(self, stack: str, expert: int, dtype: torch.dtype) -> Runner:
        if (stack, expert, dtype) not in self._runners:
            self._make(stack, dtype)
        return self._runners[stack, expert, dtype]

    def _make(self, stack: str, dtype: torch.dtype) -> None:
        whole = self.quantized_weight(stack)
        step = len(whole.codes) // (self.num_experts * len(EXPERT_PARTS[stack]))
        shared: Runner | None = None
        for expert in range(self.num_experts):
            weights, stored = [], []
            for place, part in enumerate(EXPERT_PARTS[stack]):
                start = (expert * len(EXPERT_PARTS[stack]) + place) * step
                weights.append(_rows(whole, slice(start, start + step)))
                matrix: Any = self.get_submodule(f"{expert}.{part}")
                stored.append(Stored(matrix.qweight, matrix.qzeros, matrix.scales, self.bits, self.group_size))
            runner = Runner(weights, stored, dtype, rotation_of=shared)
            shared = shared or runner
            self._runners[stack, expert, dtype] = runner

    def forget(self) -> None:
        """Drop everything made from the buffers."""
        self._runners.clear()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states
        gate_up, down = self._products(x)
        result = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue  # a place that stands for no expert
            token, place = torch.where(top_k_index == expert)
            gate, up = gate_up(expert, token).chunk(2, -1)
            y = down(expert, self.act_fn(gate) * up) * top_k_weights[token, place, None]
            result = result.index_add(0, token, y.to(result.dtype))
        return result

    def _products(self, x: Tensor) -> tuple[Callable[[int, Tensor], Tensor], Callable[[int, Tensor], Tensor]]:
        """gate and up of an expert for some tokens of x, and down of an expert; x is rotated here, once."""
        if torch.is_grad_enabled() and x.requires_grad:
            matrices = {
                stack: self.quantized_weight(stack).dequantized(x.dtype).view(self.num_experts, -1, in_features)
                for stack, (_, in_features) in self.shapes.items()
            }
            linear = nn.functional.linear
            return (
                lambda expert, token: linear(x[token], matrices["gate_up_proj"][expert]),
                lambda expert, inner: linear(inner, matrices["down_proj"][expert]),
            )
        with torch.no_grad():
            rotated = self._runner("gate_up_proj", 0, x.dtype).rotate(x) if len(x) else x
        return (
            lambda expert, token: self._runner("gate_up_proj", expert, x.dtype).multiply(rotated[token]),
            lambda expert, inner: self._runner("down_proj", expert, x.dtype)(inner),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotatedExperts:
        """Moves between devices; the dtypes of the format stay, so that `model.half()` loses nothing."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, new in dict(self.named_buffers()).items():
            if new.dtype != before[name].dtype:
                self._put(f"{BLOCK}.{name}", before[name].to(new.device))
                self.dtype = new.dtype
        self.forget()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runners": {}}


def _stacked(parameter: Tensor) -> tuple[int, int]:
    """Rows of all experts, and input channels, of (experts, out, in)."""
    return parameter.shape[0] * parameter.shape[1], parameter.shape[2]


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return replace(weight, codes=weight.codes[rows], points=weight.points[rows], steps=weight.steps[rows])
