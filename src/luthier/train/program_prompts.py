"""What is said to the model that makes problems: six kinds of calls, each a few worked examples and then the task.

The wording and the examples are ours. All calls share four example problems. Numbers are shown with marks, [2: 14], so
that the model names numbers and never copies them: what is tied to which place of a question is certain.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from luthier.llm.types import Message
from luthier.train.program_numbers import Number, find_numbers, write_answer
from luthier.train.program_source import is_free_name
from luthier.train.program_values import KINDS, Parameter, masked, with_values

VERSION = "1"
"""Raise it with every change of a word: finished problems are then made again."""

ABSTRACT = (
    "You name the numbers of a word problem, which are marked [i: number]. Reply with one line for each mark, in "
    "order: `i: name, kind`. The name is a short Python name in lower case that says what the number stands for; no "
    "two are the same. The kind is count for whole things, percent, or amount for what may have decimals, such as "
    "money. Write `i: -` for a number that must never change or that nothing is calculated from: a year, a model "
    "number, the 60 minutes of an hour."
)
PROGRAM = (
    "You turn a word problem into one Python function named `answer`. Its parameters are the names in braces, all of "
    "them. It returns the number that the problem asks for. Take inputs from the parameters only; what the problem "
    "says in words (half, a dozen) and what everybody knows (7 days in a week) are constants in the code. Do not round "
    "unless the problem asks for it. Import nothing but math and fractions. Reply with the code only."
)
VALUES = (
    "You think of new numbers for a word problem. Reply with five lines, each with all names and new values: "
    "`name=value, name=value`. Keep signs, the number of digits and the number of decimals; whole numbers stay whole "
    "and percentages stay below 100. The problem must still make sense: nobody gives away more than they have, people "
    "and things come in whole numbers, and divisions come out even."
)
REWORD = (
    "You tell a word problem anew: another setting, other names and other words, but exactly the same calculation. "
    "Keep every number as it is, in digits, each as often as it is there; add none. Keep number words (half, twice, "
    "dozen) too. Reply with the new problem between <question> and </question>."
)
READ = (
    "Two word problems ask for the same calculation. In the first, names in braces stand for numbers. In the second, "
    "numbers are marked [i: number]. Say which name each mark is, one line for each mark: `i: name`, or `i: -` for a "
    "number that has no name in the first problem."
)
SOLVE = (
    "You solve a word problem step by step: short sentences, one calculation in each, exact numbers, no rounding "
    "unless the problem asks for it. The last line is `Answer: ` and the result as a plain number without a unit."
)
_QUESTION = re.compile(r"<question>(.*?)</question>", re.DOTALL)
_LINE = re.compile(r"^\W{0,3}(?P<mark>[0-9]{1,3})\W{0,2}:\s*(?P<rest>[^\n]*)$", re.MULTILINE)
_VALUE = re.compile(r"([a-z][a-z0-9_]*)\s*=\s*([^\s=]+?)%?(?=,?\s|,?$|,[a-z])")


@dataclass(frozen=True)
class Example:
    """A problem with what a good model says about it. `names`: (name, kind) of each number, None for one that stays."""

    question: str
    names: tuple[tuple[str, str] | None, ...]
    codes: tuple[str, ...]
    values: tuple[str, ...]
    """New values; the first line is that of `reworded`."""
    reworded: str
    reading: tuple[str, ...]
    """The name of each number of `reworded`, - for one that stays."""
    solution: str

    @property
    def parameters(self) -> list[Parameter]:
        """The numbers that have names."""
        pairs = zip(self.names, find_numbers(self.question), strict=True)
        return [Parameter(name[0], name[1], number) for name, number in pairs if name is not None]  # type: ignore[arg-type]


EXAMPLES = (
    Example(
        question="A bakery packs 6 rolls into each bag and fills 14 bags. It has baked 100 rolls. How many remain?",
        names=(("rolls_in_bag", "count"), ("bags", "count"), ("baked", "count")),
        codes=("def answer(rolls_in_bag, bags, baked):\n    packed = rolls_in_bag * bags\n    return baked - packed",),
        values=(
            "rolls_in_bag=8, bags=12, baked=150",
            "rolls_in_bag=4, bags=25, baked=109",
            "rolls_in_bag=5, bags=18, baked=96",
            "rolls_in_bag=9, bags=11, baked=120",
            "rolls_in_bag=7, bags=21, baked=180",
        ),
        reworded="A library owns 150 atlases. It has filled 12 shelves with 8 atlases each. How many lie on the floor?",
        reading=("baked", "bags", "rolls_in_bag"),
        solution="The bags hold 14 * 6 = 84 rolls. Of the 100 rolls, 100 - 84 = 16 remain.\nAnswer: 16",
    ),
    Example(
        question="A coat costs $80. In a sale its price falls by 15%. What does it cost in the sale, in dollars?",
        names=(("price", "amount"), ("percent_off", "percent")),
        codes=(
            "def answer(price, percent_off):\n    discount = price * percent_off / 100\n    return price - discount",
            "from fractions import Fraction\n\ndef answer(price, percent_off):\n"
            "    share = 1 - Fraction(percent_off, 100)\n    return price * share",
        ),
        values=(
            "price=60, percent_off=25",
            "price=90, percent_off=10",
            "price=50, percent_off=12",
            "price=40, percent_off=35",
            "price=70, percent_off=20",
        ),
        reworded="A train ticket is $60, but students pay 25% less. How many dollars is it for a student?",
        reading=("price", "percent_off"),
        solution="The price falls by 80 * 15 / 100 = 12 dollars. The coat then costs 80 - 12 = 68 dollars.\nAnswer: 68",
    ),
    Example(
        question="Mira collects a dozen eggs on each of 5 days. She sells half of them at $0.30 each. "
        "How many dollars does she earn?",
        names=(("days", "count"), ("egg_price", "amount")),
        codes=("def answer(days, egg_price):\n    eggs = 12 * days\n    return eggs / 2 * egg_price",),
        values=(
            "days=8, egg_price=0.25",
            "days=3, egg_price=0.50",
            "days=6, egg_price=0.45",
            "days=7, egg_price=0.20",
            "days=4, egg_price=0.35",
        ),
        reworded="For 8 evenings Tom folds a dozen paper stars. Half of the stars go to a fair, where one costs $0.25. "
        "How many dollars come in if all of these are bought?",
        reading=("days", "egg_price"),
        solution="She collects 12 * 5 = 60 eggs. She sells 60 / 2 = 30 of them. They bring 30 * 0.30 = 9 dollars."
        "\nAnswer: 9",
    ),
    Example(
        question="In 2019 a club had 48 members. Since then 3 have joined every month for 7 months. "
        "How many members are there now?",
        names=(None, ("members", "count"), ("joining", "count"), ("months", "count")),
        codes=(
            "def answer(members, joining, months):\n    total = members\n    for _ in range(months):\n"
            "        total += joining\n    return total",
            "def answer(members, joining, months):\n    return members + joining * months",
        ),
        values=(
            "members=62, joining=5, months=9",
            "members=35, joining=4, months=6",
            "members=81, joining=2, months=8",
            "members=27, joining=6, months=5",
            "members=54, joining=8, months=3",
        ),
        reworded="Lea keeps hens. She owned 62 of them in 2019, and for 9 weeks now she has bought 5 more each week. "
        "How many hens does she own now?",
        reading=("members", "-", "months", "joining"),
        solution="In the months, 3 * 7 = 21 members joined. Now there are 48 + 21 = 69 members.\nAnswer: 69",
    ),
)


def abstract(question: str) -> list[Message]:
    """Name the numbers of a question."""
    shots = [(marked(e.question), _names(e)) for e in (EXAMPLES[2], EXAMPLES[3], EXAMPLES[1])]
    return _chat(ABSTRACT, shots, marked(question))


def program(question: str, parameters: Sequence[Parameter], seed: int) -> list[Message]:
    """Write the function. The seed shuffles the examples and chooses between their forms, for variety."""
    rng = random.Random(seed)
    examples = rng.sample(EXAMPLES, len(EXAMPLES))
    shots = [(masked(e.question, e.parameters), f"```python\n{rng.choice(e.codes)}\n```") for e in examples]
    return _chat(PROGRAM, shots, masked(question, parameters))


def values(question: str, parameters: Sequence[Parameter]) -> list[Message]:
    """Think of five sets of new values."""
    shots = [(_with_old(e.question, e.parameters), "\n".join(e.values)) for e in EXAMPLES[:3]]
    return _chat(VALUES, shots, _with_old(question, parameters))


def reword(question: str) -> list[Message]:
    """Tell a question anew, numbers untouched."""
    shots = [(_first(e), f"<question>{e.reworded}</question>") for e in EXAMPLES]
    return _chat(REWORD, shots, question)


def read(question: str, parameters: Sequence[Parameter], reworded: str) -> list[Message]:
    """Say which number of a retold question is which parameter of the original."""
    shots = [
        (
            _pair(masked(e.question, e.parameters), e.reworded),
            "\n".join(f"{i}: {name}" for i, name in enumerate(e.reading, 1)),
        )
        for e in (EXAMPLES[0], EXAMPLES[3], EXAMPLES[2])
    ]
    return _chat(READ, shots, _pair(masked(question, parameters), reworded))


def solve(question: str) -> list[Message]:
    """Solve a question in steps."""
    return _chat(SOLVE, [(e.question, e.solution) for e in EXAMPLES], question)


def marked(question: str, numbers: Sequence[Number] | None = None) -> str:
    """The question with [i: number] for each number, counted from 1."""
    parts, position = [], 0
    for index, number in enumerate(find_numbers(question) if numbers is None else numbers, 1):
        parts += [question[position : number.start], f"[{index}: {number.text}]"]
        position = number.end
    return "".join([*parts, question[position:]])


def read_names(reply: str, numbers: Sequence[Number]) -> list[Parameter] | str:
    """The parameters in a reply to `abstract`, in the order of the numbers; a string says what is wrong with it."""
    lines = _marked_lines(reply, len(numbers))
    if isinstance(lines, str):
        return lines
    parameters = []
    for number, line in zip(numbers, lines, strict=True):
        name, comma, kind = (part.strip() for part in line.partition(","))
        if name == "-" and not comma:
            continue
        if kind not in KINDS:
            return f"not name, kind: {line[:60]}"
        parameters.append(Parameter(name, kind, number))  # type: ignore[arg-type]
    return _unfit_names(parameters) or parameters


def read_reading(reply: str, numbers: Sequence[Number]) -> dict[str, Fraction] | str:
    """The value of each name in a reply to `read`; a string says what is wrong with it."""
    lines = _marked_lines(reply, len(numbers))
    if isinstance(lines, str):
        return lines
    found = [(name, number.value) for name, number in zip(lines, numbers, strict=True) if name != "-"]
    if len({name for name, _ in found}) < len(found):
        return "a name stands for two numbers"
    return dict(found)


def read_values(reply: str, parameters: Sequence[Parameter]) -> list[dict[str, Fraction] | str]:
    """The sets of values in a reply to `values`, a line each; a string says what is wrong with a line."""
    return [_values_of(line, parameters) for line in reply.splitlines() if "=" in line][:5]


def read_question(reply: str) -> str | None:
    """The question in a reply to `reword`, on one line; None when there is none."""
    found = _QUESTION.findall(reply)
    return " ".join(found[-1].split()) or None if found else None


def _unfit_names(parameters: Sequence[Parameter]) -> str:
    names = [p.name for p in parameters]
    if not names:
        return "no number may change"
    if len(set(names)) < len(names):
        return "two numbers of one name"
    for parameter in parameters:
        if not is_free_name(parameter.name):
            return f"not a name for a number: {parameter.name[:40]}"
        if parameter.kind == "count" and parameter.number.value.denominator != 1:
            return f"a count that is not whole: {parameter.number.text}"
    return ""


def _values_of(line: str, parameters: Sequence[Parameter]) -> dict[str, Fraction] | str:
    found = {}
    for name, text in _VALUE.findall(line.replace("`", "")):
        numbers = find_numbers(text)
        if len(numbers) != 1 or numbers[0].text != text or name in found:
            return f"{name}={text[:20]} cannot be read"
        found[name] = numbers[0].value
    if set(found) != {p.name for p in parameters}:
        return f"{len(found)} values, expected {', '.join(p.name for p in parameters)}"
    return {p.name: found[p.name] for p in parameters}


def _marked_lines(reply: str, count: int) -> list[str] | str:
    """What a reply says of the marks 1 to count, each once and in order; a string says what is wrong with it."""
    plain = reply.replace("`", "").replace("*", "")
    lines = [(int(match["mark"]), match["rest"].strip()) for match in _LINE.finditer(plain)]
    if [mark for mark, _ in lines] != list(range(1, count + 1)):
        return f"other marks: {len(lines)}, expected {count}"
    return [rest for _, rest in lines]


def _names(example: Example) -> str:
    return "\n".join(f"{i}: {', '.join(name) if name else '-'}" for i, name in enumerate(example.names, 1))


def _first(example: Example) -> str:
    """The example's question with the values that its retelling has."""
    new = _values_of(example.values[0], example.parameters)
    assert isinstance(new, Mapping)
    return with_values(example.question, example.parameters, new)


def _with_old(question: str, parameters: Sequence[Parameter]) -> str:
    old = ", ".join(f"{p.name}={write_answer(p.number.value)}" for p in parameters)
    return f"{masked(question, parameters)}\n{old}"


def _pair(original: str, retold: str) -> str:
    return f"First: {original}\nSecond: {marked(retold)}"


def _chat(system: str, shots: Sequence[tuple[str, str]], asked: str) -> list[Message]:
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    return [{"role": "system", "content": system}, *turns, {"role": "user", "content": asked}]
