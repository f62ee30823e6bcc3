"""Puzzles made by reasoning-gym: mini sudokus and zebra puzzles.

`mini-sudoku` is the published set of 100 (seed 42). The published zebra set has only 35 different puzzles among its
100: every one was generated with seed 42, so equal sizes repeat. `zebra` has 100 different ones; `zebra-compat`
repeats as the published set does. Making both takes minutes, so their puzzles come with the package: `zebra.jsonl.gz`
holds what reasoning-gym gave, by seed and size. Others are made when they are asked for.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from luthier.core.errors import require
from luthier.tasks.task import Kind, Problem, Task

SEED = 42
SIZE = 100


def mini_sudoku(size: int = SIZE) -> Task:
    """4 x 4 sudokus with 8 to 12 empty cells. Any grid that obeys the rules and keeps the givens is right."""
    made = _generate("mini_sudoku", seed=SEED, size=size)
    problems: list[Problem] = []
    for number, item in enumerate(made):
        puzzle = "\n".join(" ".join(str(cell or "_") for cell in row) for row in item["metadata"]["puzzle"])
        problems.append(_problem(number, item, "sudoku", puzzle=puzzle))
    return Task("mini-sudoku", problems)


def zebra(size: int = SIZE) -> Task:
    """Zebra puzzles of 2 to 7 people and characteristics, all different."""
    rng, seen, seed = random.Random(SEED), set[str](), 0
    problems: list[Problem] = []
    while len(problems) < size:
        seed += 1
        people, characteristics = rng.randint(2, 7), rng.randint(2, 7)
        item = _zebra(seed, people, characteristics)
        if item["question"] not in seen:
            seen.add(item["question"])
            problems.append(_problem(len(problems), item, "exact", people=people, characteristics=characteristics))
    return Task("zebra", problems)


def zebra_compat(size: int = SIZE) -> Task:
    """As `zebra`, every puzzle from the same seed: of 36 sizes, each always gives the same puzzle."""
    rng = random.Random(SEED)
    problems = []
    for number in range(size):
        people, characteristics = rng.randint(2, 7), rng.randint(2, 7)
        item = _zebra(SEED, people, characteristics)
        problems.append(_problem(number, item, "exact", people=people, characteristics=characteristics))
    return Task("zebra-compat", problems)


def _zebra(seed: int, people: int, characteristics: int) -> Mapping[str, str]:
    return _kept().get((seed, people, characteristics)) or make_zebra(seed, people, characteristics)


@functools.lru_cache
def make_zebra(seed: int, people: int, characteristics: int) -> Mapping[str, str]:
    """Question and answer of a puzzle, made by reasoning-gym: up to half a minute for the largest."""
    made = _generate("zebra_puzzles", seed=seed, size=1, num_people=people, num_characteristics=characteristics)
    return {"question": made[0]["question"], "answer": made[0]["answer"]}


@functools.cache
def _kept() -> dict[tuple[int, int, int], Mapping[str, str]]:
    packed = resources.files("luthier.tasks").joinpath("zebra.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
    return {(row["seed"], row["people"], row["characteristics"]): row for row in rows}


def _generate(name: str, **options: int) -> Any:
    return require("reasoning_gym", "reason").create_dataset(name, **options)


def _problem(number: int, item: Mapping[str, Any], kind: Kind, **metadata: Any) -> Problem:
    return Problem(id=str(number), prompt=item["question"], answer=item["answer"], kind=kind, metadata=metadata)


PUZZLES: dict[str, Callable[[], Task]] = {"mini-sudoku": mini_sudoku, "zebra": zebra, "zebra-compat": zebra_compat}
