"""transformers reads and writes ParoQuant checkpoints: its quantizer for `quant_method: paroquant`.

`import luthier` registers it (see `luthier.models.register.run_after_import`), so this file imports neither torch nor
the rest of the package before a quantized model is loaded. Its tensors are loaded as they are stored, whatever dtype
the rest of the model gets: transformers keeps the dtype that a module's buffers have already.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.core.errors import CheckpointError
from luthier.quantize.config import BITS, MAX_ROUNDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.models.tensor_files import TensorFiles

QUANT_METHOD = "paroquant"


def register() -> None:
    """Make transformers use this file. An entry of the authors' package, which needs CUDA, is replaced."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ParoQuantConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ParoQuantizer


class ParoQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json; other keys than these three are kept as they are.

    CheckpointError for values that no checkpoint has.
    """

    def __init__(self, *, bits: int = 4, group_size: int = 128, krot: int = 8, **others: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.bits, self.group_size, self.krot = bits, group_size, krot
        self.__dict__.update({key: value for key, value in others.items() if key != "quant_method"})
        possible = {
            "bits": bits in BITS,
            "group_size": isinstance(group_size, int) and group_size > 0 and group_size % 2 == 0,
            "krot": isinstance(krot, int) and 0 <= krot <= MAX_ROUNDS,
        }
        for key, good in possible.items():
            if not good:
                raise CheckpointError(
                    f"quantization_config: {key} is {getattr(self, key)!r}, which no checkpoint has",
                    hint="use the config.json that belongs to these weights",
                )


class ParoQuantizer(HfQuantizer):
    """Puts quantized modules in place of the ordinary ones before transformers loads the weights."""

    requires_calibration = True  # quantizing is `luthier quantize`, not loading
    quantization_config: ParoQuantConfig

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors that were loaded."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        from luthier.models.tensor_files import TensorFiles
        from luthier.quantize.checkpoint import owner

        tensors = TensorFiles(checkpoint_files or ())
        owners = (owner(name, tensors) for name in tensors)
        names = list(dict.fromkeys(name for name in owners if name is not None))
        if not names:
            raise CheckpointError(
                f"{model.config.name_or_path}: config.json says paroquant, but no tensor ends in .qweight",
                hint="use the config.json that belongs to these weights",
            )
        paths = {path for path, _ in model.named_modules()}
        prefix = f"{model.base_model_prefix}."
        for name in names:
            candidates = (name, name.removeprefix(prefix), prefix + name)  # with or without the head's model around it
            path = next((path for path in map(_module_path, candidates) if path in paths), None)
            if path is not None:  # modules that the model lacks are left for transformers to report
                self._replace(model, path, name, tensors, dtype or model.dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from luthier.quantize.sharing import prepare

        head_bits = int(getattr(self.quantization_config, "head_bits", 16))
        logging.getLogger("luthier").info(prepare(model, head_bits))

    def _replace(self, model: PreTrainedModel, path: str, name: str, tensors: TensorFiles, dtype: torch.dtype) -> None:
        """Check the tensors of the matrix `name` and put its module into the model at `path`."""
        from torch import nn

        from luthier.quantize import older_layouts
        from luthier.quantize.experts import RotatedExperts
        from luthier.quantize.linear import RotatedLinear
        from luthier.quantize.tensors import is_experts

        if older_layouts.is_older(name, tensors):
            raise CheckpointError(
                f"{name}: stored in a layout of an older version",
                hint="rewrite it once: luthier.quantize.checkpoint.write_checkpoint(old, new, read_quantized(old), …)",
            )
        config = self.quantization_config
        settings: dict[str, Any] = {"bits": config.bits, "group_size": config.group_size, "rounds": config.krot}
        module = model.get_submodule(path)
        if isinstance(module, RotatedExperts):
            return  # put there by the other of its two matrices
        if is_experts(name):
            experts = RotatedExperts.like(module, dtype=dtype, **settings)
            for stack, (rows, in_features) in experts.shapes.items():
                self._check(f"{name.rpartition('.')[0]}.{stack}", tensors, rows, in_features, experts.num_experts)
            model.set_submodule(path, experts)
        elif isinstance(module, nn.Linear):
            self._check(name, tensors, module.out_features, module.in_features, 0)
            bias = module.bias is not None
            new = RotatedLinear(module.in_features, module.out_features, bias, dtype=dtype, **settings)
            model.set_submodule(path, new)
        else:
            raise CheckpointError(
                f"{name}: quantized, but it is a {type(module).__name__} in this model",
                hint="only nn.Linear and fused experts can be quantized",
            )

    def _check(self, name: str, tensors: TensorFiles, rows: int, in_features: int, experts: int) -> None:
        """CheckpointError for tensors that are missing, do not fit, or have impossible values."""
        from luthier.quantize import tensors as layout

        config = self.quantization_config
        want = layout.expected(
            name,
            out_features=rows,
            in_features=in_features,
            bits=config.bits,
            group_size=config.group_size,
            rounds=config.krot,
            experts=experts,
        )
        layout.check_headers(want, {key: tensors.header(key) for key in want if key in tensors})
        for key in want:
            if key.endswith(".scales"):
                layout.check_steps(key, tensors[key])
        theta, pairs, channel_scales = (tensors[key] for key in layout.transform_names(name, experts))
        layout.check_transform(name, channel_scales, pairs, theta, config.group_size)


def _module_path(name: str) -> str:
    """The module that holds a matrix: itself, or the experts."""
    from luthier.quantize.tensors import is_experts

    return name.rpartition(".")[0] if is_experts(name) else name
