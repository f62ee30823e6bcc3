from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core.errors import ConfigError
from luthier.llm.prices import Prices
from luthier.llm.types import Usage


def test_costs_are_dollars_and_unknown_models_have_none(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("small: {input: 0.5, output: 2}\n")
    prices = Prices.read(path)
    assert prices.cost("small", Usage(prompt_tokens=1_000_000, completion_tokens=500_000)) == pytest.approx(1.5)
    assert prices.cost("other", Usage(prompt_tokens=1)) is None
    assert prices.cost("small", Usage(prompt_tokens=1, unreported=1)) is None


@pytest.mark.parametrize("text", ["- a", "small: 3", "small: {input: 1}", "small: {input: -1, output: 1}"])
def test_bad_tables_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"prices\.yaml"):
        Prices.read(path)
