"""The fifteen checks of `benchmarks/reason_simulation.py` in small form; the whole has 2,000 problems a cell."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ITEMS = 20
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    """The benchmark as a module; its `record` is found beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("reason_simulation", BENCHMARKS / "reason_simulation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reason_simulation"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        del sys.modules["reason_simulation"]


class Here:
    """Work of a pool of processes, in this one."""

    map = staticmethod(map)


@pytest.fixture(scope="module")
def runs(simulation: ModuleType) -> Any:
    return simulation.Runs(ITEMS, Here())


@pytest.mark.parametrize("number", [n for n in range(1, 16) if n != 10])
def test_check(simulation: ModuleType, runs: Any, number: int) -> None:
    judgements = simulation.CHECKS[number - 1](runs)
    assert judgements
    assert [text for text, fine in judgements if not fine] == []


def test_check_10_traps_are_mended_while_they_are_the_smaller_part(simulation: ModuleType, runs: Any) -> None:
    """Without chance errors every wrong step is a trap, so that few problems are enough: half is the threshold."""
    assert len(simulation.CHECKS) == 15
    mended = {}
    for strength in (0.2, 0.8):
        cell = runs.cell(5, "ssr:samples=9,rounds=1", items=60, error=0.0, trap=0.3, trap_strength=strength)
        (solutions,) = runs.of(cell)
        firsts = simulation.first_checks(cell, solutions)
        hits = [
            fine
            for steps, fine in zip(firsts, simulation.right(cell, solutions), strict=True)
            if not all(good for _, good in steps)
        ]
        assert len(hits) > 10
        mended[strength] = sum(hits) / len(hits)
    assert mended[0.2] > 0.7
    assert mended[0.8] < 0.2


def test_a_solver_with_other_habits_fails_the_checks(simulation: ModuleType) -> None:
    """The tolerance of a small form still tells a solver that errs twice as often from the right one."""
    runs = simulation.Runs(ITEMS * 2, Here())
    cell = runs.cell(12, "cot", error=0.05)
    (measured,) = runs.accuracy(cell)
    expected = simulation.chance_of_chain(12, simulation.replace(cell.habits, error=0.2))
    assert not simulation.near("cot", measured, expected, cell.items)[1]
