"""One bundle of matrices while it is being quantized: what each stage trains, and the weights that result.

The layer runs on its own activations; only its weights are replaced by  Ŵ = T⁻¹(fakequant(T(W)))  (section 3.4). As
the rotation of a group is one small dense matrix, T is a batched matrix product, and the angles' gradient flows through
that matrix alone: exact, and at the speed of matrix products.

Departures, each off in the preset `paper`: scales are trained as logarithms, so that they stay positive, and start from
a search; stage 2 may start from GPTQ's codes, and trains the weights in the rotated basis, in units of their step size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luthier.quantize.affine import SMALLEST_RANGE, decode, encode, fake_quantize, grid
from luthier.quantize.assemble import assemble
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.gptq import gptq, rotated_hessian
from luthier.quantize.gradient import reference_rotate
from luthier.quantize.layer import Bundle
from luthier.quantize.pairs import PAIRINGS
from luthier.quantize.rotation import apply_blocks, block_matrices
from luthier.quantize.scales import search_scales
from luthier.quantize.weights import QuantizedWeight, padded

LARGEST_LOG_SCALE = 6.9  # ln 1000: beyond it 1/α loses too many digits in fp16
INSIDE = 0.49  # of a step: how far a latent weight may lie from its code and still round to it


class Student(nn.Module):
    """Weights (rows, in), transform and grid of one bundle as parameters; `in` is padded to whole groups.

    Stage 1 trains `theta` and `scale`; the grid follows the rotated weights. `fix_transform` ends it. Stage 2 trains
    `weight`, `step` and `zero`: as they are, or, with `weight_basis` "rotated", after the transform and in units of the
    first step size (`step` is then the logarithm of a factor), where one learning rate suits all models.
    """

    pairs: Tensor
    active: Tensor

    def __init__(self, bundle: Bundle, weight: Tensor, config: QuantizeConfig, *, seed: int) -> None:
        super().__init__()
        self.bundle, self.config = bundle, config
        channels, device = padded(bundle.in_features, config.group_size), weight.device
        draw = PAIRINGS[config.pairing]
        pairs, filler = draw(channels, group_size=config.group_size, rounds=config.rounds, seed=seed)
        self.register_buffer("pairs", torch.from_numpy(pairs).to(device))
        self.register_buffer("active", torch.from_numpy(~filler).to(device))
        self.weight = nn.Parameter(nn.functional.pad(weight.detach(), (0, channels - bundle.in_features)))
        self.theta = nn.Parameter(torch.zeros(config.rounds, channels // 2, device=device))
        self.scale = nn.Parameter(torch.full((channels,), float(config.scale_parameter != "log"), device=device))
        groups = (len(self.weight), channels // config.group_size, 1)
        self.step = nn.Parameter(torch.empty(groups, device=device))
        self.zero = nn.Parameter(torch.empty(groups, device=device))
        self.fixed: Tensor | None = None  # the transform's matrices once stage 1 is over
        self.unit: Tensor | None = None  # the step sizes that stage 2 starts from, where it counts in them
        self.requires_grad_(False)

    @property
    def alpha(self) -> Tensor:
        """The scales of the weight's channels (in,)."""
        if self.config.scale_parameter != "log":
            return self.scale
        return self.scale.clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp()

    @alpha.setter
    def alpha(self, value: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(value.log() if self.config.scale_parameter == "log" else value)

    def search_scales(self, hessian: Tensor) -> None:
        """Start from the scales that serve plain rounding best, given the input's second moments (in, in)."""
        moments = self._padded(hessian)
        self.alpha = search_scales(self.weight, moments, bits=self.config.bits, group_size=self.config.group_size)

    def weights(self) -> dict[str, Tensor]:
        """The weights Ŵ that the layer computes with, by parameter. Differentiable in what the stage trains."""
        bits = self.config.bits
        if self.fixed is None:
            alpha, (rotate, unrotate) = self.alpha, self._rotation()
            grouped = self._grouped(rotate(self.weight * alpha))
            effective = unrotate(fake_quantize(grouped, *grid(grouped, bits), bits).flatten(1)) / alpha
        else:
            values = fake_quantize(self._latent(), self._steps(), self.zero, bits)
            effective = apply_blocks(values.flatten(1), self.fixed.transpose(1, 2)) / self.alpha
        return self.bundle.split(effective[:, : self.bundle.in_features])

    def _rotation(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The rotation of stage 1 and its inverse, with the gradient that the settings ask for."""
        theta, size = self.theta * self.active, self.config.group_size
        if self.config.gradient == "reference":
            return (
                lambda rows: reference_rotate(rows, self.pairs, theta, size),
                lambda rows: reference_rotate(rows, self.pairs.flip(0), -theta.flip(0), size),
            )
        matrices = block_matrices(self.pairs, theta, group_size=size)
        return lambda rows: apply_blocks(rows, matrices), lambda rows: apply_blocks(rows, matrices.transpose(1, 2))

    @torch.no_grad()
    def fix_transform(self, hessian: Tensor | None = None) -> None:
        """End stage 1: round the transform to what a file stores, and set up stage 2.

        With the second moments of the bundle's input, hessian (in, in), the codes start from GPTQ in the rotated basis,
        otherwise from rounding.
        """
        self.theta.copy_((self.theta * self.active).half().float())
        self.alpha = 1 / (1 / self.alpha).half().float()
        self.fixed = block_matrices(self.pairs, self.theta, group_size=self.config.group_size).contiguous()
        latent = self._latent()
        step, zero = grid(latent, self.config.bits)
        if hessian is not None:
            latent = self._gptq(latent, step, zero, hessian)
        self.zero.copy_(zero)
        if self.config.weight_basis == "original":
            self.step.copy_(step)
            return
        self.unit = step
        self.step.zero_()
        self.weight.copy_((latent / step).flatten(1))

    def _gptq(self, latent: Tensor, step: Tensor, zero: Tensor, hessian: Tensor) -> Tensor:
        """Latent weights, as close to those given as they can be, that round to GPTQ's codes."""
        assert self.fixed is not None
        bits, size = self.config.bits, self.config.group_size
        blocks = self.fixed / self.alpha.view(-1, size, 1)  # x' = x · blocks
        moments = rotated_hessian(self._padded(hessian), blocks)
        codes, points, _ = gptq(latent.flatten(1), moments, bits=bits, group_size=size, step=step, zero=zero)
        near, margin = decode(self._grouped(codes), points[..., None], step), INSIDE * step
        return near + (latent - near).clamp(-margin, margin)

    def _latent(self) -> Tensor:
        """The weights of stage 2 in the rotated basis, before rounding, (rows, in / G, G)."""
        assert self.fixed is not None
        if self.unit is None:
            return self._grouped(apply_blocks(self.weight * self.alpha, self.fixed))
        return self._grouped(self.weight) * self.unit

    def _steps(self) -> Tensor:
        """Step sizes as a file holds them, with straight-through gradients."""
        step = (self.step if self.unit is None else self.unit * self.step.exp()).clamp(min=SMALLEST_RANGE)
        return step + (step.half().float() - step).detach()

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.view(len(weight), -1, self.config.group_size)

    def _padded(self, hessian: Tensor) -> Tensor:
        return nn.functional.pad(hessian, (0, self.weight.shape[1] - len(hessian)) * 2)

    @torch.no_grad()
    def export(self) -> dict[str, QuantizedWeight]:
        """The quantized matrices by name, after stage 1 has ended."""
        step = self._steps()
        codes, points = encode(self._latent(), step, self.zero, self.config.bits)
        return assemble(
            self.bundle,
            codes=codes.flatten(1),
            points=points[..., 0],
            steps=step[..., 0],
            theta=self.theta.half(),
            pairs=self.pairs,
            channel_scales=(1 / self.alpha).half(),
            config=self.config,
        )
