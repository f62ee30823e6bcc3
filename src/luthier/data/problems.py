"""Problems of graded length whose answers are certain: small programs of assignments, modulo a prime.

    b*3=q;f=17;f+5=b;q?

The length is the number of operations. Names are random, so that nothing can be told from them, and so is the order of
the statements, if asked for. Every operation uses the variable before it and, in a `chain`, a number, or, in a `tree`,
any earlier variable. What would undo a mistake is
not drawn: x-x, and products with 0 in a tree. Some calculations are held out: problems of the split `train` and `test`
never need one, those of `held-out` need one at least. Length can be held out by asking for other lengths.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed

Form = Literal["chain", "tree", "mixed"]
Split = Literal["train", "test", "held-out"]
OPERATIONS = "+-*"
LONGEST = len(string.ascii_lowercase) - 2
"""Operations, as every variable needs a letter of its own."""


@dataclass(frozen=True)
class Operation:
    """`left` `sign` `right` = `name`, where left is a variable and right a variable or a number."""

    name: str
    left: str
    sign: str
    right: str

    @property
    def text(self) -> str:
        """As it stands in the problem."""
        return f"{self.left}{self.sign}{self.right}={self.name}"


@dataclass(frozen=True)
class Program:
    """Known values, then operations; the last variable is asked for. All values are modulo `modulus`."""

    known: Mapping[str, int]
    operations: tuple[Operation, ...]
    modulus: int
    form: str
    written: tuple[str, ...] = ()
    """The statements as the problem has them, if not one after the other as they are worked out."""

    @property
    def statements(self) -> list[str]:
        """What is given, in the order in which it is worked out."""
        return [*(f"{name}={value}" for name, value in self.known.items()), *(o.text for o in self.operations)]

    @property
    def question(self) -> str:
        """The problem as text."""
        return ";".join([*(self.written or self.statements), f"{self.operations[-1].name}?"])

    @property
    def answer(self) -> str:
        """The right value of the last variable."""
        return str(self.values()[self.operations[-1].name])

    def operands(self, operation: Operation, values: Mapping[str, int]) -> tuple[int, int]:
        """The two numbers that an operation works on, given the values of the variables before it."""
        right = values[operation.right] if operation.right in values else int(operation.right)
        return values[operation.left], right

    def apply(self, operation: Operation, values: Mapping[str, int]) -> int:
        """What follows for an operation from the values of the variables before it."""
        left, right = self.operands(operation, values)
        return calculate(operation.sign, left, right, self.modulus)

    def values(self, mistakes: Mapping[int, int] | None = None) -> dict[str, int]:
        """The value of every variable. `mistakes`: by which amount the step of that index (from 0) goes wrong."""
        values = dict(self.known)
        for index, operation in enumerate(self.operations):
            wrong = (mistakes or {}).get(index, 0)
            values[operation.name] = (self.apply(operation, values) + wrong) % self.modulus
        return values

    def triples(self, mistakes: Mapping[int, int] | None = None) -> Iterator[tuple[str, int, int]]:
        """Every (operation, left, right) that is worked out on the way."""
        values = self.values(mistakes)
        for operation in self.operations:
            yield operation.sign, *self.operands(operation, values)


def calculate(sign: str, left: int, right: int, modulus: int | None = None) -> int:
    """left `sign` right, modulo `modulus` if there is one."""
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return value if modulus is None else value % modulus


def is_held_out(triple: tuple[str, int, int], share: float) -> bool:
    """Whether a calculation belongs to the share (0 to 1) that training never shows; the same for every seed.

    3+5 and 5+3 are one calculation.
    """
    sign, *operands = triple
    if sign in "+*":
        operands.sort()
    return hash_fraction(repr((sign, *operands))) < share


def hash_fraction(text: str) -> float:
    """A number from 0 to less than 1 that is decided by the text alone: what is below a share is on one side of it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def draw_program(
    length: int,
    seed: int,
    *,
    modulus: int = 31,
    form: Form = "mixed",
    split: Split = "train",
    share: float = 0.03,
    shuffled: bool = False,
    unused: int = 0,
) -> Program:
    """A random program of `length` operations. Equal arguments give equal programs, and splits never share one.

    share: of calculations that are held out. shuffled: the statements are in no order. unused: most operations besides,
    on variables without a value; statements are shuffled then.
    Raises: ConfigError for an impossible length or modulus.
    """
    if not 1 <= length <= LONGEST:
        raise ConfigError(f"length: got {length}, expected 1 to {LONGEST}", hint="every variable needs its own letter")
    if modulus < 3:
        raise ConfigError(f"modulus: got {modulus}, expected 3 or more", hint="31 and 97 are usual")
    for attempt in range(10_000):
        rng = random.Random(derive_seed(seed, "program", split, length, attempt))
        program = _draw(rng, length, modulus, form)
        held = any(is_held_out(triple, share) for triple in program.triples())
        if held == (split == "held-out") and (hash_fraction(program.question) < 0.9) == (split == "train"):
            return replace(program, written=_write(rng, program, unused)) if shuffled or unused else program
    raise ConfigError(
        f"no problem of {length} operations fits the split {split!r}", hint="change the share of what is held out"
    )


def _draw(rng: random.Random, length: int, modulus: int, form: Form) -> Program:
    form = rng.choice(("chain", "tree")) if form == "mixed" else form
    names = rng.sample(string.ascii_lowercase, length + 2)
    num_known = 1 if form == "chain" else 2
    known = {name: rng.randrange(modulus) for name in names[:num_known]}
    program = Program(known, (), modulus, form)
    for name in names[num_known : num_known + length]:
        values = program.values()
        operation = _draw_operation(rng, name, values, program)
        program = replace(program, operations=(*program.operations, operation))
    return program


def _draw_operation(rng: random.Random, name: str, values: Mapping[str, int], program: Program) -> Operation:
    left, sign = list(values)[-1], rng.choice(OPERATIONS)
    if program.form == "chain":
        return Operation(name, left, sign, str(rng.randrange(2, program.modulus)))
    right = rng.choice(list(values))
    if (sign == "-" and right == left) or (sign == "*" and 0 in (values[left], values[right])):
        sign = "+"
    return Operation(name, left, sign, right)


def _write(rng: random.Random, program: Program, unused: int) -> tuple[str, ...]:
    """The statements in no order, among up to `unused` operations on names that have no value."""
    free = sorted(set(string.ascii_lowercase) - set(program.values()))
    count = rng.choice((0, rng.randint(0, min(unused, len(free) - 1))))
    names = rng.sample(free, count + 1)
    others = [
        f"{left}{rng.choice(OPERATIONS)}{rng.randrange(2, program.modulus)}={right}" for left, right in pairwise(names)
    ]
    statements = [*program.statements, *others]
    return tuple(rng.sample(statements, len(statements)))


def problem_row(program: Program, name: str, split: Split) -> dict[str, Any]:
    """A problem as a row of kind `answer`."""
    metadata = {"length": len(program.operations), "form": program.form, "split": split}
    return {"id": name, "prompt": program.question, "answer": program.answer, "metadata": metadata}
