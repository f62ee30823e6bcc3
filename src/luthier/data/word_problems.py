"""Arithmetic word problems that a program verifies: a question, and the calculation that answers it.

    Ada has 3 apples. Ben hands over 4 more apples. How many apples does Ada have now?    3 + 4 = 7    #### 7

Instella's synthetic problems in miniature (arXiv 2511.10628): a seed problem becomes a program, its inputs are changed,
and the program gives the new answer. Here templates take the place of language models, and the program is a tree whose
leaves know where in the question their number stands. So nothing that is not an input is ever changed, and every answer
is exact. Departures: all numbers are integers, and a changed problem keeps its wording.

Two kinds of hold-out, both decided by hash and so the same for every seed: a share of all questions, and a share of all
calculations (operation and operands). A problem that needs a held-out calculation anywhere is of the split `pairs`; of
the others, a held-out question is of the split `questions`; the rest is for training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.core.errors import ConfigError, DataError
from luthier.core.seeds import derive_seed
from luthier.data.contamination import RunIndex
from luthier.data.problems import calculate, hash_fraction, is_held_out
from luthier.data.word_templates import (
    CONTAINERS,
    ONE_STEP,
    PEOPLE,
    THINGS,
    TWO_STEPS,
    Constant,
    Shape,
    Template,
    pieces,
)

Split = Literal["train", "questions", "pairs"]
NUMERAL = re.compile(r"\d+(?:[.,]\d+)*")
WRITTEN = re.compile(r"(\d+) ([-+*]) (\d+) =")
TRIES = 200
"""Draws before a constraint is said to be impossible."""


@dataclass(frozen=True)
class Leaf:
    """A number of the question, which has it at question[start:end]."""

    id: int
    value: int
    start: int
    end: int


@dataclass(frozen=True)
class Operation:
    """left `sign` right."""

    sign: str
    left: Expression
    right: Expression


Expression = Leaf | Constant | Operation
Calculation = tuple[str, int, int, int]
"""An operation that has been worked out: sign, left, right, result."""


@dataclass(frozen=True)
class WordProblem:
    """A question and its program."""

    question: str
    expression: Expression
    template: str = ""

    @property
    def answer(self) -> str:
        """What the program says."""
        return str(evaluate(self.expression))

    @property
    def worked(self) -> str:
        """One line per calculation, then the answer after its marker."""
        return write_worked(calculations(self.expression))

    @property
    def bare(self) -> str:
        """The answer after its marker, and nothing before it."""
        return f"#### {self.answer}"


def evaluate(expression: Expression) -> int:
    """The value of an expression."""
    if isinstance(expression, Operation):
        return calculate(expression.sign, evaluate(expression.left), evaluate(expression.right))
    return expression.value


def calculations(expression: Expression, mistakes: Mapping[int, int] | None = None) -> list[Calculation]:
    """Every operation in the order of working it out. `mistakes`: by how much that of an index (from 0) goes wrong."""
    done: list[Calculation] = []

    def value(node: Expression) -> int:
        if not isinstance(node, Operation):
            return node.value
        left, right = value(node.left), value(node.right)
        result = calculate(node.sign, left, right) + (mistakes or {}).get(len(done), 0)
        done.append((node.sign, left, right, result))
        return result

    value(expression)
    return done


def write_worked(steps: Sequence[Calculation]) -> str:
    """The steps as lines `left sign right = result`, then the last result after the marker ####."""
    lines = [f"{left} {sign} {right} = {result}" for sign, left, right, result in steps]
    return "\n".join([*lines, f"#### {steps[-1][-1]}"])


def formula(expression: Expression) -> str:
    """The expression on one line, as Python would read it."""
    if isinstance(expression, Operation):
        return f"({formula(expression.left)} {expression.sign} {formula(expression.right)})"
    return str(expression.value)


def leaves(expression: Expression) -> dict[int, Leaf]:
    """The leaves by id; a number that is used twice is one leaf."""
    if isinstance(expression, Operation):
        return leaves(expression.left) | leaves(expression.right)
    return {expression.id: expression} if isinstance(expression, Leaf) else {}


def render(template: Template, words: Mapping[str, str], values: Sequence[int]) -> WordProblem:
    """The problem of a template with its words and numbers filled in.

    Raises: DataError when the result is no sound problem (`verify`).
    """
    text, found = "", dict[int, Leaf]()
    for literal, slot in pieces(template.text):
        text += literal
        if slot.isdigit():
            number = str(values[int(slot)])
            found[int(slot)] = Leaf(int(slot), values[int(slot)], len(text), len(text) + len(number))
            text += number
        elif slot:
            text += words[slot]
    problem = WordProblem(text, _build(template.shape, found), template.name)
    verify(problem)
    return problem


def _build(shape: Shape, found: Mapping[int, Leaf]) -> Expression:
    if isinstance(shape, tuple):
        return Operation(shape[0], _build(shape[1], found), _build(shape[2], found))
    return shape if isinstance(shape, Constant) else found[shape]


def verify(problem: WordProblem) -> None:
    """Raise DataError unless each number of the question is a leaf, and each leaf the number at its place."""
    found = [(match.start(), match.end(), match.group()) for match in NUMERAL.finditer(problem.question)]
    expected = sorted((leaf.start, leaf.end, str(leaf.value)) for leaf in leaves(problem.expression).values())
    if found != expected:
        raise DataError(
            f"{problem.question!r} has the numbers {[text for *_, text in found]}, its program expects {expected}",
            hint="give each number of the wording a leaf of its own, and spell out what is no input (twice)",
        )


def rewrite(problem: WordProblem, values: Mapping[int, int]) -> WordProblem:
    """The same problem with other numbers, by leaf id: in the question, at their places, and in the program.

    Raises: DataError as `verify`.
    """
    text, position, moved = "", 0, dict[int, Leaf]()
    for leaf in sorted(leaves(problem.expression).values(), key=lambda leaf: leaf.start):
        text += problem.question[position : leaf.start]
        number = str(values[leaf.id])
        moved[leaf.id] = Leaf(leaf.id, values[leaf.id], len(text), len(text) + len(number))
        text, position = text + number, leaf.end
    text += problem.question[position:]
    changed = replace(problem, question=text, expression=_moved(problem.expression, moved))
    verify(changed)
    return changed


def _moved(expression: Expression, to: Mapping[int, Leaf]) -> Expression:
    if isinstance(expression, Operation):
        return Operation(expression.sign, _moved(expression.left, to), _moved(expression.right, to))
    return to[expression.id] if isinstance(expression, Leaf) else expression


def perturb(problem: WordProblem, rng: random.Random, operands: tuple[int, int]) -> WordProblem | None:
    """The problem with other numbers, or None when the constraints leave none.

    Constraints: all numbers lie in `operands` (both ends included) and keep their count of digits, every result is
    positive, and at least one number changes.
    """
    old = leaves(problem.expression)
    choices = {name: _same_length(leaf.value, operands) for name, leaf in old.items()}
    if not all(choices.values()):
        return None
    for _ in range(TRIES):
        values = {name: rng.choice(choice) for name, choice in choices.items()}
        if any(values[name] != leaf.value for name, leaf in old.items()):
            changed = rewrite(problem, values)
            if is_positive(calculations(changed.expression)):
                return changed
    return None


def _same_length(value: int, operands: tuple[int, int]) -> range:
    """The numbers in a range that have as many digits as `value`."""
    digits = len(str(value))
    return range(max(operands[0], 10 ** (digits - 1)), min(operands[1], 10**digits - 1) + 1)


def is_positive(steps: Iterable[Calculation]) -> bool:
    """Whether every result is a positive number: things are counted."""
    return all(result > 0 for *_, result in steps)


@dataclass(frozen=True, kw_only=True)
class WordProblems:
    """Which problems to draw, and what to hold out."""

    operands: tuple[int, int] = (2, 9)
    """Least and greatest number in a question."""
    two_steps: float = 0.25
    """Share of problems with two operations."""
    held_questions: float = 0.1
    """Share of questions that are held out."""
    held_pairs: float = 0.1
    """Share of calculations that are held out."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.operands[0] <= self.operands[1] - 3:
            raise ConfigError(
                f"operands: got {self.operands}, expected the least (2 or more) and the greatest (3 more, or higher)",
                hint="2 9 is learned in minutes, 2 20 in some more",
            )
        for name in ("two_steps", "held_questions", "held_pairs"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 to less than 1", hint="0.1 is usual")

    def split_of(self, problem: WordProblem) -> Split:
        """The one split that a problem belongs to."""
        if any(is_held_out((sign, a, b), self.held_pairs) for sign, a, b, _ in calculations(problem.expression)):
            return "pairs"
        return "questions" if hash_fraction(problem.question) < self.held_questions else "train"

    def draw(
        self,
        purpose: str,
        *,
        split: Split = "train",
        seen: set[str] | None = None,
        avoid: RunIndex | None = None,
        variants: int = 0,
    ) -> Iterator[WordProblem]:
        """Problems of a split without end, the same for equal settings and purpose.

        seen: questions not to draw; what is drawn is added to it. avoid: no question has a run of words in it.
        variants: each problem that is drawn is followed by up to so many with other numbers in it.
        Raises: ConfigError when nothing new is found any more.
        """
        rng = random.Random(derive_seed(self.seed, "word problems", purpose))
        known = set() if seen is None else seen
        failed = 0
        while failed < 50 * TRIES:
            seed_problem = self._draw(rng)
            found = [seed_problem, *(perturb(seed_problem, rng, self.operands) for _ in range(variants))]
            failed += 1
            for problem in found:
                if problem is None or problem.question in known or self.split_of(problem) != split:
                    continue
                if avoid is None or not avoid.find(problem.question)[0]:
                    known.add(problem.question)
                    failed = 0
                    yield problem
        raise ConfigError(
            f"{purpose}: there are no more problems of the split {split!r}",
            hint="ask for fewer, for a wider range of operands, or hold out another share",
        )

    def _draw(self, rng: random.Random) -> WordProblem:
        template = rng.choice(TWO_STEPS if rng.random() < self.two_steps else ONE_STEP)
        a, b = rng.sample(PEOPLE, 2)
        c, d = rng.sample(CONTAINERS, 2)
        words = {"a": a, "b": b, "c": c, "d": d, "x": rng.choice(THINGS)}
        while True:
            values = [rng.randint(*self.operands) for _ in range(3)]
            unplaced = {name: Leaf(name, value, 0, 0) for name, value in enumerate(values)}
            if is_positive(calculations(_build(template.shape, unplaced))):
                return render(template, words, values)


def problem_row(problem: WordProblem, name: str, split: Split) -> dict[str, Any]:
    """A problem as a row of kind `answer`; the metadata hold its program."""
    metadata = {
        "template": problem.template,
        "operations": len(calculations(problem.expression)),
        "formula": formula(problem.expression),
        "split": split,
    }
    return {"id": name, "prompt": problem.question, "answer": problem.answer, "metadata": metadata}


def leaks(texts: Iterable[str], held_pairs: float) -> list[str]:
    """Every calculation written out in the texts (`3 + 4 =`) that is held out: none, if they are for training."""
    return [
        f"{left} {sign} {right}"
        for text in texts
        for left, sign, right in WRITTEN.findall(text)
        if is_held_out((sign, int(left), int(right)), held_pairs)
    ]


def duplicates(texts: Iterable[str]) -> list[str]:
    """Texts that are there more than once, in the order in which they come again."""
    seen: set[str] = set()
    again = []
    for text in texts:
        if text in seen:
            again.append(text)
        seen.add(text)
    return again
