"""An 8-bit copy of the output head for decoding on a CPU: small models spend much of a token on reading it.

Our extension, off unless it is asked for: rows are rounded to int8 with one scale each. The weight itself stays as it
is for gradients, for other dtypes and for files; the copy adds half its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MAX_ROWS = 8


class Int8Head(nn.Module):
    """x (…, hidden) → (…, vocabulary): int8 for up to MAX_ROWS rows in bf16 on a CPU without gradients."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # the same parameters: ties and names stay
        self.in_features, self.out_features = head.in_features, head.out_features
        self._copy: tuple[Tensor, Tensor, tuple[int, int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        small = x.numel() <= MAX_ROWS * self.in_features and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if not small or not x.numel() or torch.is_grad_enabled():
            return nn.functional.linear(x, self.weight, self.bias)
        codes, scales = self.copy()
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, self.in_features).contiguous(), codes, scales)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def copy(self) -> tuple[Tensor, Tensor]:
        """Codes (out, in) int8 and scales (out,) bf16, made again when the weight has changed."""
        made_of = (self.weight.data_ptr(), self.weight._version)
        if self._copy is None or self._copy[2] != made_of:
            codes = torch.empty(self.weight.shape, dtype=torch.int8)
            scales = torch.empty(len(codes), dtype=torch.bfloat16)
            for start in range(0, len(codes), 4096):  # bounds the memory
                rows = slice(start, start + 4096)
                wide = self.weight[rows].float()
                scales[rows] = (wide.abs().amax(1) / 127).clamp(min=1e-12)
                codes[rows] = (wide / scales[rows, None].float()).round().clamp(-127, 127)
            self._copy = (codes, scales, made_of)
        return self._copy[:2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}


def use_int8_head(model: nn.Module) -> str:
    """Put an `Int8Head` into a model of transformers with `lm_head`; says what was done."""
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.weight.dtype != torch.bfloat16 or head.weight.device.type != "cpu":
        return "the 8-bit head was not used: it needs an lm_head in bf16 on a CPU"
    model.lm_head = Int8Head(head)
    return f"head in 8 bits up to {MAX_ROWS} rows"
