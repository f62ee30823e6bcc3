"""The methods by name: each turns one decoder layer into quantized matrices, all on the same quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from luthier.quantize.baselines import awq, gptq_method, rtn
from luthier.quantize.layer import LayerTask
from luthier.quantize.optimize import paroquant
from luthier.quantize.weights import QuantizedWeight

Method = Callable[[LayerTask], dict[str, QuantizedWeight]]


def rotated_gptq(task: LayerTask) -> dict[str, QuantizedWeight]:
    """GPTQ in the basis that stage 1 has found, without stage 2."""
    config = replace(task.config, start="gptq", epochs=(task.config.epochs[0], 0))
    return paroquant(replace(task, config=config))


METHODS: dict[str, Method] = {
    "paroquant": paroquant,
    "rotated-gptq": rotated_gptq,
    "gptq": gptq_method,
    "awq": awq,
    "rtn": rtn,
}
