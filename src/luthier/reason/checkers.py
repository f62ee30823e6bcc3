"""Programs that decide single steps where they understand them: arithmetic, sudoku grids, zebra puzzles.

A checker says whether a stated answer holds. It never guesses: what it does not fully understand is left to the votes.
Arithmetic also says what is right; the puzzles do not, they only refute what the givens or clues rule out. Checkers see
the problem as it is asked and no answer to it. Nothing a model wrote is executed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from luthier.reason.prompts import Step
from luthier.reason.statements import asserted
from luthier.tasks.answers import number
from luthier.tasks.sudoku import read_grid, solves
from luthier.tasks.zebra import read_zebra


@dataclass(frozen=True)
class Verdict:
    """Whether a stated answer holds, and the right one where it is known."""

    holds: bool
    value: str | None = None


Checker = Callable[[str, Sequence[Step], Step], Verdict | None]
_ASKED = re.compile(
    r"(?:what is|what's|compute|calculate|evaluate|find)?\s*(?:the value of)?\s*"
    r"(?P<expression>[-+*/x\u00d7\u00f7\u2212().\d\s]*[-+*/x\u00d7\u00f7\u2212][-+*/x\u00d7\u00f7\u2212().\d\s]*)"
    r"(?:\(?\s*(?:mod(?:ulo)?)\s*(?P<modulus>\d+)\s*\)?)?[\s=?.]*",
    re.IGNORECASE,
)
_SIGNS = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"})
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def check_step(names: Sequence[str], question: str, earlier: Sequence[Step], step: Step) -> Verdict | None:
    """The verdict of the first of the named checkers that understands the step; None: none does."""
    for name in names:
        if (verdict := CHECKERS[name](question, earlier, step)) is not None:
            return verdict
    return None


def arithmetic(question: str, earlier: Sequence[Step], step: Step) -> Verdict | None:
    """A sub-question that is one calculation with numbers, such as 'What is 17 + 25?'."""
    del question, earlier
    match = _ASKED.fullmatch(step.question.strip())
    stated = number(step.answer)
    if match is None or stated is None or len(match["expression"]) > 200:
        return None
    value = _calculate(match["expression"].lower().translate(_SIGNS))
    if value is None:
        return None
    if match["modulus"]:
        if value.denominator != 1 or int(match["modulus"]) == 0:
            return None
        value = Fraction(int(value) % int(match["modulus"]))
    return Verdict(value == stated, str(value))


def _calculate(expression: str) -> Fraction | None:
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def sudoku(question: str, earlier: Sequence[Step], step: Step) -> Verdict | None:
    """An answer that is a whole square grid, for a problem that shows the puzzle with '_' or '.' for empty cells."""
    del earlier
    puzzle, grid = read_grid(question, blanks=True), read_grid(step.answer)
    if puzzle is None or grid is None or len(puzzle) != len(grid):
        return None
    return Verdict(solves(grid, puzzle))


def zebra(question: str, earlier: Sequence[Step], step: Step) -> Verdict | None:
    """That a value belongs to a house or to another value, where the clues of the puzzle prove or refute it."""
    del earlier
    puzzle = read_zebra(question)
    cells = None if puzzle is None else asserted(puzzle, step.question, step.answer)
    holds = None if puzzle is None or cells is None else puzzle.decides(*cells)
    return None if holds is None else Verdict(holds)


CHECKERS: dict[str, Checker] = {"arithmetic": arithmetic, "sudoku": sudoku, "zebra": zebra}
