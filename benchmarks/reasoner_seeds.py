"""Does Socratic Self-Refine on lines help the small reasoner whatever its seed?

    python benchmarks/reasoner_seeds.py [--seeds 0 1 2] [--out runs/reasoner_seeds]

For each seed the recipe of the small reasoner (recipes/reasoner.yaml) without its last stage: the same lessons and test
problems, other initial weights, order of batches and samples. About 40 minutes a seed on one core; what is done is
skipped. The table has means over seeds with Student's interval, and SSR on lines minus each other method: over seeds,
and on all problems of all seeds as pairs (exact McNemar).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from record import record

from luthier.cli.run import find_recipe
from luthier.core.config import read_yaml
from luthier.core.console import Console
from luthier.core.stats import mcnemar, student_mean
from luthier.tasks.runner import Row, read_answers

RECIPE, LEFT_OUT, OURS = Path("recipes/reasoner.yaml"), "eval decomposed", "ssr:steps=lines"
Answers = dict[str, dict[str, list[Row]]]
"""Rows by task and method, in the order of the problems."""


def run_seed(seed: int, out: Path, changes: Sequence[str]) -> Path:
    """The folder of a seed's run, run to its end."""
    stages = [stage for stage in read_yaml(find_recipe(RECIPE)) if LEFT_OUT not in stage]
    for stage in stages:
        ((name, settings),) = stage.items()
        if seed and name.partition(" ")[0] in ("pretrain", "eval"):
            settings["seed"] = seed  # 0 is the recipe's own
    out.mkdir(parents=True, exist_ok=True)
    recipe, folder = out / f"recipe-{seed}.yaml", out / f"seed-{seed}"
    recipe.write_text(yaml.safe_dump(stages, sort_keys=False))
    command = [sys.executable, "-m", "luthier", "run", str(recipe), "--out", str(folder)]
    done = subprocess.run([*command, *(["--set", *changes] if changes else [])], check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed} stopped; the same command goes on")
    return folder


def read_run(folder: Path) -> Answers:
    """What the methods answered."""
    (file,) = folder.glob("[0-9]*-eval/answers.jsonl")
    found: Answers = {}
    for row in read_answers(file).values():
        found.setdefault(row["task"], {}).setdefault(named(row["method"]), []).append(row)
    for methods in found.values():
        for rows in methods.values():
            rows.sort(key=lambda row: row["problem"])
    return found


def named(method: str) -> str:
    """'maj@3' of 'maj@3:prompts=short,temperature=1.0'; ours keeps what makes it ours."""
    return OURS if method.startswith(OURS) else method.partition(":")[0]


def right(rows: Sequence[Row]) -> list[bool]:
    return [row["status"] == "correct" for row in rows]


def accuracy(rows: Sequence[Row]) -> float:
    return fmean(right(rows))


def tabulate(runs: Mapping[int, Answers]) -> list[dict[str, Any]]:
    """A row for each task and each method that every seed has."""
    table = []
    first, *others = runs.values()
    for task, methods in first.items():
        for method in methods:
            if not all(method in other[task] for other in others):
                continue
            each = [run[task][method] for run in runs.values()]
            ours = [run[task][OURS] for run in runs.values()]
            table.append({"task": task, "method": method, **compared(each, ours, method == OURS)})
    return table


def compared(each: Sequence[Sequence[Row]], ours: Sequence[Sequence[Row]], same: bool) -> dict[str, Any]:
    """One method over seeds, and ours minus it."""
    values = [accuracy(rows) for rows in each]
    gains = [accuracy(mine) - value for mine, value in zip(ours, values, strict=True)]
    pairs = mcnemar([x for rows in ours for x in right(rows)], [x for rows in each for x in right(rows)])

    def over_seeds(some: Sequence[float]) -> str:
        return student_mean(some).text() if len(some) > 1 else f"{some[0]:.3f}"

    return {
        "accuracy": over_seeds(values),
        "each seed": " ".join(f"{value:.3f}" for value in values),
        "tokens": round(fmean(row["completion_tokens"] for rows in each for row in rows)),
        "ours minus it": "" if same else over_seeds(gains),
        "only ours, only it": "" if same else f"{pairs.only_first}, {pairs.only_second}; p = {pairs.p:.1g}",
    }


def main() -> None:
    """Run the seeds and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/reasoner_seeds"))
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.SETTING=VALUE", help="change the recipe")
    options = parser.parse_args()
    runs = {seed: read_run(run_seed(seed, options.out, options.set)) for seed in options.seeds}
    rows = tabulate(runs)
    record("reasoner_seeds", seeds=options.seeds, changed=options.set, rows=rows)
    note = "Intervals: Student's, 95 %, over seeds. Pairs: all problems of all seeds, exact McNemar."
    Console().table("SSR on lines beside its baselines", list(rows[0]), [list(row.values()) for row in rows], note)


if __name__ == "__main__":
    main()
