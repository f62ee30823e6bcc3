"""The paper's random weights ("mitchell" in its configuration files), the same for every world size and order.

Every matrix is a normal distribution cut at three standard deviations, not renormalized. The two projections that
write into the residual stream shrink with depth. Each parameter has its own generator, seeded by its name.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from luthier.core.seeds import derive_seed
from luthier.models.arithmetic import Dimensions
from luthier.models.instella import InstellaForCausalLM, InstellaRotaryEmbedding

# Names that torch.compile and activation-checkpoint wrappers insert; weights must not depend on them.
WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def standard_deviation(name: str, dimensions: Dimensions) -> float | None:
    """σ of the parameter with this Hugging Face name before truncation; None for norm scales, which start at 1."""
    if name.endswith("norm.weight"):
        return None
    layer = re.search(r"\.layers\.(\d+)\.", f".{name}")
    depth = 2 * (int(layer[1]) + 1) if layer else 1
    if name.endswith("o_proj.weight"):
        return (depth * dimensions.hidden_size) ** -0.5
    if name.endswith("down_proj.weight"):
        return (depth * dimensions.intermediate_size) ** -0.5
    return dimensions.hidden_size**-0.5


def initial_weight(name: str, shape: torch.Size, dimensions: Dimensions, seed: int) -> Tensor:
    """The full starting value of one parameter, float32 on the CPU; a function of its name and the seed alone."""
    sigma = standard_deviation(name, dimensions)
    if sigma is None:
        return torch.ones(shape, device="cpu")
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, name))
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    return nn.init.trunc_normal_(weight, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)


@torch.no_grad()
def initialize(model: InstellaForCausalLM, seed: int) -> None:
    """Fill a model's parameters in place, and restore its RoPE frequencies.

    The model may be sharded by FSDP2 and fresh from `to_empty`: every rank draws the whole tensor and keeps its part,
    so that no rank has to speak to another and world size does not change the weights.
    """
    dimensions = model.config.dimensions
    for name, parameter in model.named_parameters():
        place(initial_weight(WRAPPERS.sub("", name), parameter.shape, dimensions, seed), parameter)
    for module in model.modules():
        if isinstance(module, InstellaRotaryEmbedding):
            module.restore_frequencies()


@torch.no_grad()
def place(weight: Tensor, parameter: Tensor) -> None:
    """Copy a whole weight into a parameter, of which this rank may hold a part only; ranks do not speak to another."""
    if isinstance(parameter, DTensor):
        weight = weight.to(parameter.device_mesh.device_type)
        weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(weight)
