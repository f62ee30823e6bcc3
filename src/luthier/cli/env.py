"""`luthier env`: what machine and which versions, for bug reports and to see what will be used."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from luthier.core.console import Console
from luthier.core.env import snapshot
from luthier.core.errors import MissingExtra, require


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Print versions, machine and devices."""


def run(config: EnvConfig, console: Console) -> None:
    """Print the environment; devices too, when torch is installed."""
    with contextlib.suppress(MissingExtra):
        require("torch", "torch")
    found = snapshot()
    if "torch_threads" in found:
        from luthier.quantize.kernels.dispatch import summary

        found["int4_kernels"] = [summary(device) for device in ("cpu", *(["cuda"] if found["devices"] else []))]
    console.table("environment", ("what", "value"), list(_flat(found).items()))
    console.result(found)


def _flat(values: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        else:
            flat[key] = ", ".join(value) or "none" if isinstance(value, list) else str(value)
    return flat
