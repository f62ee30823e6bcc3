"""`luthier eval --repeats`: pass@k and maj@k of a model whose chances are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.core.run import RunFolder
from luthier.llm.stub_server import StubServer
from luthier.llm.types import Message
from luthier.tasks.metrics import pass_at_k

RIGHT = {"0": 4, "1": 3, "2": 1, "3": 0}  # of four samples


class Solver:
    """Writes 7, which is right, the first RIGHT[n] times that it is asked problem n, and 8 after that."""

    def __init__(self) -> None:
        self.asked = dict.fromkeys(RIGHT, 0)

    def reply(self, messages: Sequence[Message], seed: int | None, index: int) -> str:
        number = next(n for n in RIGHT if f"problem {n}?" in messages[-1]["content"])
        self.asked[number] += 1
        return rf"So \boxed{{{7 if self.asked[number] <= RIGHT[number] else 8}}}"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"problem {n}?", "answer": "7"}) + "\n" for n in RIGHT))
    return path


def test_pass_at_k_over_repeats(luthier: Callable[..., Any], problems: Path, tmp_path: Path) -> None:
    with StubServer(Solver().reply).running() as server:
        command = ["eval", "stub", "--endpoint", server.url, "--tasks", problems, "--out", tmp_path / "run", "--json"]
        outcome = luthier(*command, "--repeats", "4")
        assert outcome.code == 0, outcome.err
        assert luthier(*command, "--repeats", "4").out == outcome.out
        assert server.ledger.answered == 16
    numbers = json.loads(outcome.out)["tasks"]["known"]["cot"]
    for k in (1, 2, 4):
        expected = sum(pass_at_k(right, 4, k) for right in RIGHT.values()) / 4
        assert numbers[f"pass@{k}"]["value"] == pytest.approx(expected)
        assert numbers[f"pass@{k}"]["n"] == 4  # problems, not samples
    assert numbers["accuracy"] == numbers["pass@1"]
    assert numbers["maj@4"]["value"] == 0.5
    table = RunFolder.read(tmp_path / "run").summary["tables"][1]
    assert table["columns"] == ["method", "pass@1", "pass@2", "pass@4", "maj@4", "mixed"]
    assert table["rows"][0][-1] == "0.500"  # of two problems some samples are right and some are not


def test_one_attempt_has_the_interval_of_a_proportion(
    luthier: Callable[..., Any], problems: Path, tmp_path: Path
) -> None:
    with StubServer(Solver().reply).running() as server:
        command = ["eval", "stub", "--endpoint", server.url, "--tasks", problems, "--out", tmp_path / "run", "--json"]
        outcome = luthier(*command)
    numbers = json.loads(outcome.out)["tasks"]["known"]["cot"]
    assert numbers["accuracy"]["value"] == 0.75
    assert "pass@1" not in numbers
    assert len(RunFolder.read(tmp_path / "run").summary["tables"]) == 1


def test_methods_that_were_repeated_differ_over_problems(
    luthier: Callable[..., Any], problems: Path, tmp_path: Path
) -> None:
    with StubServer(Solver().reply).running() as server:
        command = ["eval", "stub", "--endpoint", server.url, "--tasks", problems, "--out", tmp_path / "run"]
        outcome = luthier(*command, "--repeats", "2", "--method", "cot", "cot:temperature=1.0")
    assert outcome.code == 0, outcome.err
    table = RunFolder.read(tmp_path / "run").summary["tables"][-1]
    assert table["columns"][2].startswith("first minus second")
    first, second = (row[1] for row in RunFolder.read(tmp_path / "run").summary["tables"][0]["rows"])
    assert float(table["rows"][0][2].split()[0]) == pytest.approx(float(first) - float(second), abs=2e-3)
