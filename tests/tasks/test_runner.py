from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import EndpointError
from luthier.llm.types import Usage
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Proposal, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.tasks.grading import Grader
from luthier.tasks.runner import Row, run_task
from luthier.tasks.task import Problem, Task

TASK = Task("sums", [Problem(id=str(n), prompt=f"{n}+{n}?", answer=str(2 * n)) for n in range(10)])


@dataclass
class Adder:
    """Solves sums; fails for the prompts in `down`."""

    down: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, prompt: str, seed: int, name: str) -> Solution:
        self.asked.append(prompt)
        if prompt in self.down:
            raise EndpointError("down", hint="wait")
        answer = str(2 * int(prompt.split("+")[0]) + (prompt in self.wrong))
        usage = Usage(prompt_tokens=3, completion_tokens=2, calls=1)
        return Solution(answer, answer, (Proposal(0, answer, answer),), "done", usage, None, (), 0.01)


def run(solver: Any, path: Path, task: Task = TASK, **options: Any) -> list[Row]:
    async def work() -> list[Row]:
        async with Grader() as grader:
            return await run_task(task, solver, grader, path, method="sum", **options)

    return asyncio.run(work())


def test_rows_are_in_the_order_of_the_problems_and_graded(tmp_path: Path) -> None:
    rows = run(Adder(wrong=frozenset({"3+3?"})), tmp_path / "a.jsonl", repeats=2)
    assert [(row["problem"], row["repeat"]) for row in rows] == [(str(n), r) for n in range(10) for r in range(2)]
    assert [row["problem"] for row in rows if row["status"] == "wrong"] == ["3", "3"]


def test_a_second_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = run(Adder(), path, replace(TASK, problems=TASK.problems[:6]))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    solver = Adder()
    rows = run(solver, path)
    assert len(solver.asked) == 5
    assert [row["status"] for row in rows] == ["correct"] * 10
    assert rows[:5] == first[:5]


def test_failures_are_never_graded_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    failing = frozenset({"2+2?"})
    (row,) = [row for row in run(Adder(down=failing), path) if row["problem"] == "2"]
    assert (row["status"], row["error"]) == ("failed", "down")
    assert "answer" not in row
    solver = Adder()
    assert [row["status"] for row in run(solver, path)] == ["correct"] * 10
    assert solver.asked == ["2+2?"]


def test_a_changed_problem_is_solved_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run(Adder(), path)
    solver = Adder()
    run(solver, path, Task("sums", [Problem(id="0", prompt="7+7?", answer="14"), *TASK.problems[1:]]))
    assert solver.asked == ["7+7?"]


def test_cancelling_keeps_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    class Slow(Adder):
        async def __call__(self, prompt: str, seed: int, name: str) -> Solution:
            await asyncio.sleep(0 if prompt < "4" else 60)
            return await super().__call__(prompt, seed, name)

    async def work() -> None:
        async with Grader() as grader:
            await asyncio.wait_for(run_task(TASK, Slow(), grader, path, method="sum", at_once=2), 0.3)

    with pytest.raises(TimeoutError):
        asyncio.run(work())
    assert [json.loads(line)["problem"] for line in path.read_text().splitlines()] == ["0", "1", "2", "3"]


def test_the_right_answers_cannot_be_reached_while_solving(tmp_path: Path) -> None:
    """With shuffled right answers the outputs are the same to the byte, and accuracy falls to nothing."""
    chains = [Chain.draw(4, n) for n in range(20)]
    golds = [chain.answer for chain in chains]
    shuffled = golds[:]
    random.Random(0).shuffle(shuffled)
    results = []
    for number, answers in enumerate((golds, shuffled)):
        backend = SimulatedSolver(Habits(error=0.1))
        problems = [
            Problem(id=str(i), prompt=chain.question, answer=gold)
            for i, (chain, gold) in enumerate(zip(chains, answers, strict=True))
        ]

        async def solver(prompt: str, seed: int, name: str, backend: SimulatedSolver = backend) -> Solution:
            return await solve(prompt, Models(backend), parse_method("ssr"), equivalence=equal, seed=seed)

        results.append(run(solver, tmp_path / f"{number}.jsonl", Task("chains", problems)))
    outputs = [[(row["text"], row["answer"], row["calls"]) for row in rows] for rows in results]
    assert outputs[0] == outputs[1]
    right = [sum(row["status"] == "correct" for row in rows) for rows in results]
    assert right[0] >= 18
    assert right[1] <= 3


async def equal(a: str, b: str) -> bool:
    return a == b
