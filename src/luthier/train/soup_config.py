"""Settings of `luthier soup`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luthier.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SoupConfig:
    """Average the weights of models that were trained from the same start, such as stage 2 under three seeds."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Model folders, or run folders, whose model is taken; two or more."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/soup")
    """Run folder; the averaged model goes to its `model`."""
    weights: tuple[float, ...] = ()
    """Share of each model, on any scale; empty: all the same, as in the paper."""

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigError(f"models: got {len(self.models)}, expected at least 2", hint="luthier soup A B -o OUT")
        if self.weights and len(self.weights) != len(self.models):
            raise ConfigError(
                f"weights: got {len(self.weights)} for {len(self.models)} models", hint="give one weight for each model"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"weights: got {self.weights}, expected positive numbers", hint="leave a model out")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, 1 each where none are given."""
        return self.weights or (1.0,) * len(self.models)
