"""A linear module with quantized weights: buffers are a checkpoint's tensors, kernels hold copies packed their own way.

Gradients, with respect to the input only, go through the decoded weights: exact and slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.quantize.kernels.cpu import Stored
from luthier.quantize.kernels.dispatch import Runner
from luthier.quantize.tensors import MATRIX, TRANSFORM, expected, from_tensors, to_tensors
from luthier.quantize.weights import QuantizedWeight

if TYPE_CHECKING:
    from luthier.quantize.sharing import SharedProduct


class RotatedLinear(nn.Module):
    """y = rotate(x · channel_scales) @ weightᵀ + bias, for x (…, in_features); buffers as in `tensors`.

    `dtype` is that of the bias and of the activations to expect; others work, with kernels made at the first call.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    theta: Tensor
    pairs: Tensor
    channel_scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int,
        group_size: int,
        rounds: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.rounds, self.dtype = bits, group_size, rounds, dtype
        headers = expected(
            "",
            out_features=out_features,
            in_features=in_features,
            bits=bits,
            group_size=group_size,
            rounds=rounds,
        )
        for name, (kind, shape) in headers.items():
            self.register_buffer(name.removeprefix("."), torch.zeros(shape, dtype=kind, device=device))
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = nn.Parameter(empty, requires_grad=False) if empty is not None else None
        self._runners: dict[torch.dtype, Runner] = {}
        self.shared: SharedProduct | None = None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> RotatedLinear:
        """The module of a quantized matrix, on its device. CheckpointError for values that no reader could use."""
        module = cls(
            weight.in_features,
            weight.codes.shape[0],
            bias is not None,
            bits=weight.bits,
            group_size=weight.group_size,
            rounds=weight.rounds,
            dtype=dtype,
            device=weight.codes.device,
        )
        for name, tensor in to_tensors("", weight).items():
            module._buffers[name.removeprefix(".")] = tensor
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return module

    def quantized_weight(self) -> QuantizedWeight:
        """The matrix, unpacked."""
        tensors = {f".{name}": getattr(self, name) for name in (*MATRIX, *TRANSFORM)}
        return from_tensors("", tensors, self.out_features, self.in_features, self.bits, self.group_size)

    def stored(self) -> Stored:
        """The buffers as kernels read them."""
        return Stored(self.qweight, self.qzeros, self.scales, self.bits, self.group_size)

    def runner(self, dtype: torch.dtype) -> Runner:
        """The kernels of this matrix alone, made at the first call."""
        if dtype not in self._runners:
            self._runners[dtype] = Runner([self.quantized_weight()], [self.stored()], dtype)
        return self._runners[dtype]

    def forget(self) -> None:
        """Drop everything made from the buffers."""
        self._runners.clear()
        if self.shared is not None:
            self.shared.dissolve()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"got an input of {x.shape[-1]} channels, expected {self.in_features}")
        if torch.is_grad_enabled() and x.requires_grad:
            y = nn.functional.linear(x, self.quantized_weight().dequantized(x.dtype))
        elif self.shared is not None and x.numel():
            y = self.shared.take(self, x)
        else:
            y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def multiply(self, x: Tensor) -> Tensor:
        """The product of this matrix alone, without bias and gradients."""
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.runner(x.dtype)(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.bits} bits, G={self.group_size}, K={self.rounds}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotatedLinear:
        """Moves between devices; the dtypes of the format stay, so that `model.half()` loses nothing."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        dtype = self.dtype if self.bias is None else self.bias.dtype
        moved = any(old is not None and old.device != self.qweight.device for old in before.values())
        if moved or dtype != self.dtype:
            self.dtype = dtype
            self.forget()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runners": {}, "shared": None}
