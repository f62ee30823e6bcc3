from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
QUICK = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "2", "--device", "cpu")


def test_every_model_is_measured_in_one_table(luthier: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "copy")
    outcome = luthier("bench", "decode", trained / "model", tmp_path / "copy", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "decode, × first" in outcome.out
    assert "interleaved rounds" in outcome.out
    outcome = luthier("bench", "decode", trained / "model", *QUICK, "--dtype", "bfloat16", "--json")
    (found,) = json.loads(outcome.out)["models"].values()
    assert found["dtype"] == "bfloat16"
    assert 0 < found["decode"]["low"] <= found["decode"]["value"] <= found["decode"]["high"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["decode"], "models: got none"),
        (["decode", "m", "m"], "the same one is given twice"),
        (["decode", "m", "--repeats", "0"], "repeats: got 0, expected 1 or more"),
        (["encode", "m"], "encode"),
        (["decode", "./missing/model"], "no such model folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(luthier: Command, arguments: list[str], told: str) -> None:
    outcome = luthier("bench", *arguments)
    assert outcome.code == 2
    assert told in outcome.error


def test_a_prompt_beyond_the_model_is_refused(luthier: Command, trained: Path) -> None:
    assert "reads at most" in luthier("bench", "decode", trained / "model", "--prompt-tokens", "99999").error
