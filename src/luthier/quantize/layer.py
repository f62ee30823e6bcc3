"""What is quantized in a decoder layer, and which matrices share an input and so one transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.core.errors import CheckpointError
from luthier.quantize.config import QuantizeConfig

EXPERT_MATRICES = ("gate_up_proj", "down_proj")  # of transformers' fused experts: (experts, out, in) parameters


@dataclass(frozen=True)
class Part:
    """One parameter of a layer: a matrix (out, in), or a stack of them (experts, out, in)."""

    parameter: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The module's name, or the parameter's for experts: the key of its QuantizedWeight."""
        return self.parameter.removesuffix(".weight")

    @property
    def rows(self) -> int:
        """Rows of all matrices of the stack."""
        return int(torch.Size(self.shape[:-1]).numel())


@dataclass(frozen=True)
class Bundle:
    """Matrices with one input, and so with one transform; their rows are stacked."""

    parts: tuple[Part, ...]

    @property
    def in_features(self) -> int:
        """Channels of the common input."""
        return self.parts[0].shape[-1]

    def stack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """All rows (rows, in) from parameters by name."""
        return torch.cat([parameters[part.parameter].reshape(part.rows, -1) for part in self.parts])

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """Rows (rows, …) as parameters by name, each in its own shape but for the last dimension."""
        pieces = stacked.split([part.rows for part in self.parts])
        return {
            part.parameter: piece.reshape(*part.shape[:-1], piece.shape[-1])
            for part, piece in zip(self.parts, pieces, strict=True)
        }


class Activations(Protocol):
    """Hidden states of all windows (n, tokens, hidden), in memory or in a file."""

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> Tensor:
        """Windows start to stop, on the layer's device in fp32."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerTask:
    """One decoder layer to quantize: the original layer, the inputs that the quantized model gives it, and its targets.

    `layer` is on its device in fp32 with its original weights, in evaluation mode, without gradients. `inputs` are from
    the layers before it as quantized, `targets` from the original model (section 3.4 of the paper). `arguments` are the
    other keyword arguments of the layer's forward, good for a batch of any size.
    """

    index: int
    layer: nn.Module
    bundles: tuple[Bundle, ...]
    inputs: Activations
    targets: Activations
    validation_inputs: Activations
    validation_targets: Activations
    arguments: Mapping[str, Any]
    config: QuantizeConfig
    log: Callable[[Mapping[str, Any]], None] = field(default=lambda row: None)

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output (batch, tokens, hidden), with some parameters replaced."""
        return layer_output(self.layer, hidden, self.arguments, weights)


def layer_output(
    layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Hidden states (batch, tokens, hidden) after a decoder layer, with some parameters replaced."""
    out = torch.func.functional_call(layer, dict(weights or {}), (hidden,), dict(arguments))
    return out[0] if isinstance(out, tuple) else out


def plan_bundles(
    layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], config: QuantizeConfig
) -> tuple[Bundle, ...]:
    """Find the matrices of a layer and, by running it once on hidden (1, tokens, hidden), those with the same input.

    CheckpointError for a layer without any linear module, and for a `skip` that leaves none.
    """
    inputs = dict[str, Tensor]()  # kept alive, so that identity means the same tensor
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            layer_output(layer, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    groups = dict[int, list[Part]]()
    for name, tensor in inputs.items():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        part = Part(f"{name}.weight", tuple(linear.weight.shape))
        if not _skipped(name, config):
            groups.setdefault(id(tensor) if config.share else len(groups), []).append(part)
    bundles = [Bundle(tuple(parts)) for parts in groups.values()]
    bundles += [Bundle((part,)) for part in _expert_parts(layer, config)]
    if not bundles:
        raise CheckpointError(
            f"{type(layer).__name__}: no linear module to quantize in it",
            hint="check `skip`; architectures without nn.Linear layers are not supported",
        )
    return tuple(bundles)


def _expert_parts(layer: nn.Module, config: QuantizeConfig) -> Iterator[Part]:
    for name, parameter in layer.named_parameters():
        owner, _, last = name.rpartition(".")
        if last in EXPERT_MATRICES and parameter.dim() == 3 and not _skipped(name, config):
            if getattr(layer.get_submodule(owner), "is_transposed", False):
                raise CheckpointError(
                    f"{type(layer).__name__}: its experts are stored as (experts, in, out)",
                    hint="leave them as they are: add --skip '*experts*'",
                )
            yield Part(name, tuple(parameter.shape))


def _skipped(name: str, config: QuantizeConfig) -> bool:
    return any(fnmatch(name, pattern) for pattern in config.skip)
