"""Speed: tokens per second and model FLOPs utilization (MFU)."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

# Dense bf16 peak in FLOP/s by a part of the device's name, the first that fits; sources: the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, each of which is a device
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a fraction of: the data sheet's for a known GPU, else those of a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    return measured_flops(device, dtype)


def prefers_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively, which makes it about twice as fast as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 0, repeats: int = 6) -> float:
    """FLOP/s of the fastest of a few square matrix products; `size` 0 picks one that fills the device."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """6 FLOPs per multiplied parameter and 12·L·d·S for attention scores, for any Hugging Face decoder config.

    The same convention as `models.arithmetic`; parameters are counted before sharding.
    """
    config = model.config
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
    tied = model.get_output_embeddings() is None or getattr(config, "tie_word_embeddings", False)
    multiplied = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding)
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * sequence_length


class Meter:
    """Tokens per second and MFU between two readings."""

    def __init__(self, flops_per_token: float, peak: float) -> None:
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.tokens, self.seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.tokens += tokens
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        """The rates since the last reading."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.tokens, self.seconds = 0, 0.0
        return {"tokens_per_second": round(rate, 1), "mfu": round(rate * self.flops_per_token / self.peak, 4)}
