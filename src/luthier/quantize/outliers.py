"""Outlier channels that leave a model's function as it is: a test of how robust a quantizer is.

Some channels grow by a factor in one matrix and shrink by it in the module that feeds them, as trained models do by
themselves. The logits stay, but a quantizer that looks at one matrix at a time loses the small channels of its groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.core.seeds import derive_seed

# module whose output is linear in its weight's rows -> the matrices that read it, by the names of Llama and its kin
FEEDS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_attention_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}


@torch.no_grad()
def inject_outliers(model: nn.Module, *, factor: float = 16.0, share: float = 0.03, seed: int = 0) -> int:
    """Make a share of the channels of every decoder layer `factor` times larger, in place; returns how many.

    For pre-norm layers with the names of Llama. Raises: CheckpointError when no layer has such names, or norms stand
    behind the matrices (Olmo2), where a norm's weight feeds no matrix.
    """
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr, assignment]
    count = 0
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        if "post_feedforward_layernorm" in modules or not set(FEEDS) & set(modules):
            raise CheckpointError(
                f"{type(layer).__name__}: no known module feeds its matrices", hint="use a model like Llama or Instella"
            )
        for source, readers in FEEDS.items():
            if source in modules and all(reader in modules for reader in readers):
                draw = torch.Generator().manual_seed(derive_seed(seed, "outliers", index, source))
                head = int(modules["self_attn"].head_dim) if source == "self_attn.v_proj" else 0  # type: ignore[arg-type]
                count += _move(modules[source], [modules[reader] for reader in readers], factor, share, head, draw)
    return count


def _move(
    source: nn.Module, readers: list[nn.Module], factor: float, share: float, head: int, draw: torch.Generator
) -> int:
    """`head` is the width of a head where several query heads read each channel of a key-value head, else 0."""
    weight: Tensor = source.weight  # type: ignore[assignment]
    size, width = len(weight), int(readers[0].weight.shape[1])  # type: ignore[union-attr, index, arg-type]
    chosen = torch.randperm(size, generator=draw)[: max(1, round(share * size))]
    weight[chosen] /= factor
    if getattr(source, "bias", None) is not None:
        source.bias[chosen] /= factor  # type: ignore[index, operator]
    head = head or size
    columns = torch.arange(width).view(size // head, width // size, head)[chosen // head, :, chosen % head].flatten()
    for reader in readers:
        reader.weight[:, columns] *= factor  # type: ignore[index, operator]
    return len(chosen)
