"""Conversations that teach a small model what Socratic Self-Refine asks of one, in the short wording.

Solving step by step; decomposing a solution as it stands, mistakes included; answering one step from stated values,
right or wrong; solving again after a doubt, which is sometimes mistaken; judging and rewriting whole solutions;
comparing answers. Only the last reply is learned: a solution with a mistake in it is context.

Five things decide how soon a small model learns any of this. A line is the statement as the problem has it, then the
same with numbers (`f+5=b:17+5=22`), so that each token follows from one other place. Short problems are common: on them
it learns to copy. Statements are in no order, among others that nothing follows from: otherwise the model counts places
in place of looking for names, and fails on problems longer than it has seen. Before all lessons come strings without
sense (`strings`), short ones first: finding the statement that begins with a name takes two layers that work together,
the first of which helps nothing alone; they form where little else is to be seen. And plain calculations are drilled:
in solutions only one token in twenty is the result of one.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core.seeds import derive_seed
from luthier.data.problems import OPERATIONS, Form, Operation, Program, calculate, draw_program, is_held_out
from luthier.llm.types import Message
from luthier.reason.prompts import SHORT, Finding, Step

Values = Mapping[str, int]
Row = dict[str, Any]
Kind = Literal["solve", "step", "decompose", "refine", "judge", "rewrite", "confidence", "drill", "find"]
FOUND = 8
"""Names in one search."""
DRILLED = 12
"""Calculations in one drill."""
SHORTEST_STRING = 2
"""Tokens of a string."""
STRINGS = 3
"""Strings of a row: what others say keeps from guessing among what is left of one."""
PER_OPERATION = 3
"""Statements among which names are looked up, for each operation of the longest problem."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What to teach, on which problems."""

    count: int
    lengths: tuple[int, int]
    """Shortest and longest problem, in operations."""
    modulus: int = 31
    form: Form = "mixed"
    share: float = 0.03
    """Of calculations that are never shown."""
    shuffled: bool = True
    """Whether the statements of a problem are in no order."""
    unused: int = 6
    """Most statements of a problem that nothing follows from."""
    seed: int = 0
    only: tuple[Kind, ...] = ()
    """Kinds of lessons; empty: all. Finding comes first in a model's life: the others need it."""
    solve: float = 0.34
    """Relative frequency of each kind of lesson."""
    step: float = 0.2
    decompose: float = 0.24
    refine: float = 0.16
    judge: float = 0.08
    rewrite: float = 0.06
    confidence: float = 0.02
    drill: float = 0.12
    find: float = 0.2
    false_hints: float = 0.15
    """Share of doubts about a step that is right."""

    def rows(self) -> Iterator[Row]:
        """The lessons, as rows of kind `messages`."""
        kinds = {"solve": _solve, "step": _step, "decompose": _decompose, "refine": _refine, "judge": _judge}
        kinds |= {"rewrite": _rewrite, "confidence": _confidence, "drill": _drill, "find": _find}
        weights = [getattr(self, name) * (not self.only or name in self.only) for name in kinds]
        for number in range(self.count):
            seed = derive_seed(self.seed, "lesson", number)
            rng = random.Random(seed)
            length = self._length(rng)
            how: dict[str, Any] = {"modulus": self.modulus, "form": self.form, "share": self.share}
            program = draw_program(length, seed, **how, shuffled=self.shuffled, unused=self.unused)
            name = rng.choices(list(kinds), weights)[0]
            *given, reply = kinds[name](self, rng, program)
            context = [{**m, "weight": 0} if m["role"] == "assistant" else dict(m) for m in given]
            yield {"messages": [*context, dict(reply)], "lesson": name, "length": length}

    @property
    def most_statements(self) -> int:
        """Among which names are looked up, in lessons of nothing else."""
        return min(PER_OPERATION * self.lengths[1], len(string.ascii_lowercase) - 2)

    def _length(self, rng: random.Random) -> int:
        lengths = range(self.lengths[0], self.lengths[1] + 1)
        return rng.choices(lengths, [1 / length for length in lengths])[0]


def line(program: Program, operation: Operation, values: Values) -> str:
    """One step: the operation as it stands, the same with numbers, and the value that `values` has for it."""
    left, right = program.operands(operation, values)
    return f"{operation.text}:{left}{operation.sign}{right}={values[operation.name]}"


def solution(program: Program, values: Values) -> str:
    """A chain of thought: one line a step, what is asked, the answer."""
    lines = [line(program, operation, values) for operation in program.operations]
    last = program.operations[-1].name
    return "\n".join([*lines, f"{last}?", f"####{values[last]}"])


def steps(program: Program, values: Values) -> list[Step]:
    """The Socratic steps of a solution."""
    return [Step(f"{operation.name}?", str(values[operation.name])) for operation in program.operations]


def mistakes(lessons: Lessons, rng: random.Random, program: Program, most: int = 2) -> dict[int, int]:
    """A few steps that go wrong, and by how much: near misses are likelier. What is held out never comes up."""
    for _ in range(50):
        chosen = rng.sample(range(len(program.operations)), min(rng.randint(1, most), len(program.operations)))
        wrong = {
            index: rng.choice((1, -1, 10, -10, 2, rng.randrange(1, program.modulus))) % program.modulus
            for index in chosen
        }
        found = {index: amount for index, amount in sorted(wrong.items()) if amount}
        if found and not any(is_held_out(triple, lessons.share) for triple in program.triples(found)):
            return found
    return {}


def _perhaps(lessons: Lessons, rng: random.Random, program: Program, chance: float) -> dict[int, int]:
    return mistakes(lessons, rng, program) if rng.random() < chance else {}


def _solve(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    return [*SHORT.solve(program.question), _reply(solution(program, program.values()))]


def _decompose(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    values = program.values(_perhaps(lessons, rng, program, 0.5))
    asked = SHORT.decompose(program.question, solution(program, values))
    return [*asked, _reply(SHORT.steps(steps(program, values)))]


def _step(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    values = program.values(_perhaps(lessons, rng, program, 0.5))
    index = rng.randrange(len(program.operations))
    operation, stated = program.operations[index], steps(program, values)
    result = program.apply(operation, values)
    asked = SHORT.step(program.question, stated[:index], stated[index].question)
    return [*asked, _reply(f"{line(program, operation, {**values, operation.name: result})}\n####{result}")]


def _refine(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    wrong = mistakes(lessons, rng, program, most=3)
    values, stated = program.values(wrong), steps(program, program.values(wrong))
    findings: list[Finding] = []
    for index in wrong:
        right = str(program.apply(program.operations[index], values))
        findings.append(Finding(stated[index], right, asserted=not findings))
    if not findings or rng.random() < lessons.false_hints:
        index = rng.randrange(len(stated))
        other = (values[program.operations[index].name] + rng.randrange(1, program.modulus)) % program.modulus
        findings = [Finding(stated[index], str(other))]
    asked = SHORT.refine(program.question, solution(program, values), findings)
    return [*asked, _reply(solution(program, program.values()))]


def _judge(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    """The judge works it out again, then gives 5 or 0."""
    values, right = program.values(_perhaps(lessons, rng, program, 0.5)), program.values()
    last = program.operations[-1].name
    own = solution(program, right).rpartition("\n")[0]
    asked = SHORT.judge(program.question, solution(program, values))
    return [*asked, _reply(f"{own}\n####{5 if values[last] == right[last] else 0}")]


def _rewrite(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    values, right = program.values(_perhaps(lessons, rng, program, 0.8)), program.values()
    own = solution(program, right).rpartition("\n")[0]
    last = program.operations[-1].name
    verdict = f"{own}\n####{5 if values[last] == right[last] else 0}"
    asked = SHORT.rewrite(program.question, solution(program, values), verdict)
    return [*asked, _reply(solution(program, right))]


def _confidence(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    answer = rng.randrange(program.modulus)
    share = rng.choice((0.0, 0.2, 0.8, 1.0))
    references = [answer if rng.random() < share else rng.randrange(program.modulus) for _ in range(5)]
    asked = SHORT.confidence(str(answer), [str(reference) for reference in references])
    return [*asked, _reply(f"####{sum(reference == answer for reference in references)}")]


def _find(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    """Which statement begins with a name, for names in any order among statements in any order."""
    names = rng.sample(string.ascii_lowercase, len(string.ascii_lowercase))
    count = rng.randint(2, lessons.most_statements)
    found = {
        name: f"{name}{rng.choice(OPERATIONS)}{rng.randrange(2, program.modulus)}={names[index + 1]}"
        for index, name in enumerate(names[:count])
    }
    asked = rng.choices(names[:count], k=FOUND)  # with repetition, or the last ones follow without looking
    statements = rng.sample(list(found.values()), count)
    reply = _reply("\n".join(found[name] for name in asked))
    return [{"role": "user", "content": f"{';'.join(statements)}\n{';'.join(asked)}\nFind."}, reply]


def _drill(lessons: Lessons, rng: random.Random, program: Program) -> list[Message]:
    """Calculations such as those that the steps of a problem need, one a line."""
    given: list[str] = []
    results: list[str] = []
    while len(given) < DRILLED:
        left, right, sign = rng.randrange(program.modulus), rng.randrange(program.modulus), rng.choice(OPERATIONS)
        if not is_held_out((sign, left, right), lessons.share):
            given.append(f"{left}{sign}{right}")
            results.append(f"{given[-1]}={calculate(sign, left, right, program.modulus)}")
    return [{"role": "user", "content": f"{';'.join(given)}\nCalculate."}, _reply("\n".join(results))]


def strings(count: int, longest: int, modulus: int, seed: int) -> Iterator[Row]:
    """Rows of kind `text`, three times: up to `longest` tokens without sense, then the same again from one of them on.

    Only what stood after a token tells what comes next. All tokens of a string differ: of one that comes twice, what
    stands after it would not be known.
    """
    for number in range(count):
        rng = random.Random(derive_seed(seed, "strings", longest, number))
        lines: list[str] = []
        for _ in range(STRINGS):
            tokens = _nonsense(modulus, rng, rng.randint(SHORTEST_STRING, longest))
            lines += ["".join(tokens), "".join(tokens[rng.randrange(len(tokens) - 1) :])]
        yield {"text": "\n".join(lines)}


def _nonsense(modulus: int, rng: random.Random, count: int) -> list[str]:
    """Up to `count` names, operations and results, each a token; no name after another, and none at the ends."""
    names = list(string.ascii_lowercase)
    others = [f"{sign}{number}" for sign in OPERATIONS for number in range(2, modulus)]
    others += [f"={name}" for name in names]
    start, *rest, end = rng.sample(others, len(others))
    drawn = rng.sample([*rest, *names], min(count - 2, len(rest) + len(names)))
    tokens = [start, *(token for token in drawn if not token.isalpha()), end]
    between = [token for token in drawn if token.isalpha()][: len(tokens) - 1]
    places = sorted(rng.sample(range(1, len(tokens)), len(between)), reverse=True)
    for place, name in zip(places, between, strict=True):
        tokens.insert(place, name)
    return tokens


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}
