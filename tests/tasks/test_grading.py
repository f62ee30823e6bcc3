from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from luthier.tasks.grading import Grade, Grader
from luthier.tasks.sudoku import read_grid, solves
from luthier.tasks.task import Kind, Problem, Task

Result = TypeVar("Result")


def problem(answer: str, kind: Kind = "math", **metadata: object) -> Problem:
    return Problem(id="1", prompt="?", answer=answer, kind=kind, metadata=metadata)


def with_grader(work: Callable[[Grader], Awaitable[Result]], **options: float) -> Result:
    async def run() -> Result:
        async with Grader(**options) as grader:  # type: ignore[arg-type]
            return await work(grader)

    return asyncio.run(run())


def test_algebra_decides_what_numbers_cannot() -> None:
    cases = [
        ("x^2+2x+1", "(x+1)^2", "correct"),
        (r"2\sqrt{2}", r"\sqrt{8}", "correct"),
        (r"\{1,2\}", r"\{2,1\}", "correct"),
        ("[0,1)", "(0,1]", "wrong"),
        ("x+1", "x+2", "wrong"),
        ("x+1", "", "unparsed"),
        ("x+1", "__import__('os').system('false')", "wrong"),
        ("x+1", "x" * 3000, "unparsed"),
    ]

    async def grade(grader: Grader) -> list[str]:
        return [(await grader.grade(answer, problem(gold))).status for gold, answer, _ in cases]

    assert with_grader(grade) == [status for *_, status in cases]


def test_a_slow_comparison_is_a_timeout_and_the_next_one_works() -> None:
    async def grade(grader: Grader) -> tuple[Grade, Grade]:
        await grader.grade("1+x", problem("x+1"))  # the worker is up
        late = await grader.grade("5", problem("12!!!!!"))
        return late, await grader.grade("y+1", problem("1+y"))

    late, after = with_grader(grade, workers=1, deadline=1.0)
    assert late.status == "timeout"
    assert after == Grade("correct", "algebra")


def test_no_worker_outlives_the_grader_or_a_cancelled_comparison() -> None:
    def workers() -> int:
        found = subprocess.run(["pgrep", "-fc", "luthier.tasks.grading_worker 2047"], capture_output=True, text=True)
        return int(found.stdout)

    async def cancelled(grader: Grader) -> int:
        task = asyncio.ensure_future(grader.equivalent("12!!!!!", "5"))
        await asyncio.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return workers()

    assert with_grader(cancelled, workers=1, memory=2047) == 0
    assert workers() == 0


def test_answers_are_grouped_by_meaning() -> None:
    answers = ["1/2", None, "0.5", "3", r"\frac12", "three", "3.0"]
    clusters = with_grader(lambda grader: grader.cluster(answers))
    assert [(cluster.answer, cluster.members) for cluster in clusters] == [
        ("1/2", (0, 2, 4)),
        ("3", (3, 6)),
        ("three", (5,)),
    ]


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "status"),
    [
        ("The Dog", "dog", "exact", "correct"),
        ("cat", "dog", "exact", "wrong"),
        ("(B)", "B", "choice", "correct"),
        ("b. red", "B", "choice", "correct"),
        ("red", "B", "choice", "correct"),
        ("blue", "B", "choice", "wrong"),
        ("A long story", "A", "choice", "unparsed"),
        (None, "A", "choice", "unparsed"),
    ],
)
def test_words_and_letters(answer: str | None, gold: str, kind: Kind, status: str) -> None:
    grade = with_grader(lambda grader: grader.grade(answer, problem(gold, kind, options=["blue", "red"])))
    assert grade.status == status


PUZZLE = "_ 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 _"
SOLUTION = "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (SOLUTION, "correct"),
        (f"```\n{SOLUTION}\n```", "correct"),
        (SOLUTION.replace("\n", " "), "correct"),
        (SOLUTION.replace("1 2 3 4", "2 1 3 4"), "wrong"),
        ("no idea", "unparsed"),
    ],
)
def test_sudoku_grids(answer: str, status: str) -> None:
    sudoku = problem(SOLUTION, "sudoku", puzzle=PUZZLE)
    assert with_grader(lambda grader: grader.grade(answer, sudoku)).status == status


def test_any_grid_that_obeys_the_rules_and_the_givens_counts() -> None:
    empty = read_grid("\n".join(["_ _ _ _"] * 4), blanks=True)
    grid = read_grid(SOLUTION)
    assert empty is not None
    assert grid is not None
    assert solves(grid, empty)
    assert not solves([row[::-1] for row in grid], [["1", "_", "_", "_"], *empty[1:]])
    assert read_grid("1 2\n3") is None


def test_the_hash_of_a_task_names_its_content() -> None:
    one, other = Task("t", [problem("1")]), Task("t", [problem("2")])
    assert one.sha256 == Task("renamed", [problem("1")]).sha256 != other.sha256
