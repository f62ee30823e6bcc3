"""The benchmark of the small reasoner over seeds: its recipes, and how seeds are compared. No training here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import reasoner_seeds as benchmark

from luthier.cli.run import read_recipe
from luthier.core.files import append_jsonl

ROOT = Path(__file__).parents[2]
METHODS = {"cot:temperature=1.0": "1100", "ssr:steps=lines,samples=3": "1110"}  # right or wrong, problem by problem


def test_a_seed_moves_training_and_sampling_but_no_problem(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    seeds: dict[int, dict[str, Any]] = {}
    for seed in (0, 3):
        benchmark.run_seed(seed, tmp_path, [])
        stages = read_recipe(tmp_path / f"recipe-{seed}.yaml", tmp_path)
        seeds[seed] = {stage.name: stage for stage in stages}
    recipe = {stage.name: stage for stage in read_recipe(ROOT / "recipes" / "reasoner.yaml", tmp_path)}
    assert set(seeds[0]) == set(recipe) - {"decomposed"}
    for name, stage in seeds[0].items():
        assert stage.config == recipe[name].config
        moved = stage.verb in ("pretrain", "eval")
        assert seeds[3][name].config.seed == (3 if moved else stage.config.seed)


def test_methods_are_compared_over_seeds_and_pair_by_pair(tmp_path) -> None:
    for seed, flip in ((0, ""), (1, "3")):
        (tmp_path / f"seed-{seed}" / "13-eval").mkdir(parents=True)
        for number in (3, 1, 0, 2):  # as they end, which is in no order
            for method, right in METHODS.items():
                correct = right[number] == "1" or str(number) in flip
                append_jsonl(
                    tmp_path / f"seed-{seed}" / "13-eval" / "answers.jsonl",
                    {
                        "task": "test-16",
                        "problem": f"16-{number}",
                        "method": method,
                        "repeat": 0,
                        "status": "correct" if correct else "wrong",
                        "completion_tokens": 10,
                    },
                )
    runs = {seed: benchmark.read_run(tmp_path / f"seed-{seed}") for seed in (0, 1)}
    cot, ours = benchmark.tabulate(runs)
    assert (cot["method"], cot["each seed"], cot["tokens"]) == ("cot", "0.500 0.750", 10)
    assert (ours["method"], ours["each seed"], ours["ours minus it"]) == ("ssr:steps=lines", "0.750 1.000", "")
    assert cot["ours minus it"] == "0.250 [0.250, 0.250]"
    assert cot["only ours, only it"] == "2, 0; p = 0.5"


def test_a_seed_that_stops_stops_the_benchmark(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 130))
    with pytest.raises(SystemExit, match="the same command goes on"):
        benchmark.run_seed(0, tmp_path, [])
