"""What tokens cost, from a table that the user keeps. A model that is not in it has no price: never 0, never a guess.

qwen3-8b: {input: 0.05, output: 0.2}   # dollars per million tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.core.config import read_yaml
from luthier.core.errors import ConfigError
from luthier.llm.types import Usage

MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens, (prompt, generated), by model name."""

    table: Mapping[str, tuple[float, float]]

    @classmethod
    def read(cls, path: Path) -> Prices:
        """The table in a YAML file. Raises: ConfigError naming what is wrong."""
        content = read_yaml(path)
        if not isinstance(content, Mapping):
            raise ConfigError(f"{path}: expected models with prices", hint="name: {input: 0.05, output: 0.2}")
        return cls({str(model): _pair(price, f"{path}: {model}") for model, price in content.items()})

    def cost(self, model: str, usage: Usage) -> float | None:
        """Dollars; None when the model is not in the table or the server did not tell all tokens."""
        if model not in self.table or usage.unreported:
            return None
        prompt, generated = self.table[model]
        return (usage.prompt_tokens * prompt + usage.completion_tokens * generated) / MILLION


def _pair(price: object, where: str) -> tuple[float, float]:
    if isinstance(price, Mapping) and set(price) == {"input", "output"}:
        pair = price["input"], price["output"]
        if all(isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 for value in pair):
            return float(pair[0]), float(pair[1])
    raise ConfigError(
        f"{where}: got {price!r}, expected input and output, in dollars per million tokens",
        hint="name: {input: 0.05, output: 0.2}",
    )
