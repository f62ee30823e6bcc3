from __future__ import annotations

import asyncio

from luthier.tasks.grading import Grader
from luthier.tasks.puzzles import mini_sudoku, zebra, zebra_compat
from luthier.tasks.sudoku import read_grid, solves
from luthier.tasks.task import Task

MINI_SUDOKU = "a23e81da650639383ab0b7291cb2322b210ea080b9b47a75e28ea30f29d356ce"


def test_mini_sudoku_is_the_published_set() -> None:
    task = mini_sudoku()
    assert task.sha256 == MINI_SUDOKU
    for problem in task.problems:
        puzzle, answer = read_grid(problem.metadata["puzzle"], blanks=True), read_grid(problem.answer)
        assert puzzle is not None
        assert answer is not None
        assert solves(answer, puzzle)
        assert 8 <= sum(cell == "_" for row in puzzle for cell in row) <= 12


def test_zebra_puzzles_differ_and_the_published_ones_repeat() -> None:
    assert len({problem.prompt for problem in zebra(5).problems}) == 5
    prompts: dict[tuple[int, int], set[str]] = {}
    for problem in zebra_compat(12).problems:
        size = (problem.metadata["people"], problem.metadata["characteristics"])
        prompts.setdefault(size, set()).add(problem.prompt)
    assert all(len(same) == 1 for same in prompts.values())


def test_the_right_answers_are_graded_correct() -> None:
    async def grade(task: Task) -> set[str]:
        async with Grader() as grader:
            return {(await grader.grade(problem.answer, problem)).status for problem in task.problems}

    for task in (mini_sudoku(20), zebra(3)):
        assert asyncio.run(grade(task)) == {"correct"}
