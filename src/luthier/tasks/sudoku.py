"""Sudoku grids of any square size: reading them from text, and their rules."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Grid = Sequence[Sequence[str]]


def read_grid(text: str, *, blanks: bool = False) -> list[list[str]] | None:
    """The last square block of single cells (digits 1 to 9; with `blanks` also _ and .) in the text, or None."""
    cell = re.compile(r"[1-9_.]" if blanks else r"[1-9]")
    rows: list[list[str]] = []
    found = None
    for line in [*text.splitlines(), ""]:
        cells = line.split()
        if cells and all(cell.fullmatch(item) for item in cells):
            rows.append(cells)
            continue
        if len(rows) > 1 and all(len(row) == len(rows) for row in rows):
            found = rows
        rows = []
    return found


def solves(grid: Grid, puzzle: Grid) -> bool:
    """Whether a full grid keeps the givens of a puzzle of the same size and has every value once in each unit."""
    size = len(grid)
    box = math.isqrt(size)
    if size != len(puzzle) or box * box != size:
        return False
    values = {str(value) for value in range(1, size + 1)}
    columns = [[row[column] for row in grid] for column in range(size)]
    boxes = [
        [grid[top + i][left + j] for i in range(box) for j in range(box)]
        for top in range(0, size, box)
        for left in range(0, size, box)
    ]
    kept = all(
        given in ("_", ".", cell)
        for givens, cells in zip(puzzle, grid, strict=True)
        for given, cell in zip(givens, cells, strict=True)
    )
    return kept and all(set(unit) == values for unit in [*grid, *columns, *boxes])
