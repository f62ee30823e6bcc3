from __future__ import annotations

from fractions import Fraction

import pytest

from luthier.train import program_prompts as prompts
from luthier.train.program_numbers import find_numbers, last_number
from luthier.train.program_prompts import EXAMPLES, Example
from luthier.train.program_source import FUNCTIONS, MATH, Refused, is_free_name, read_program
from luthier.train.program_values import fits
from luthier.train.sandbox_child import namespace, plain, write


def value(code: str, **arguments: int | Fraction) -> Fraction:
    program = read_program(code, list(arguments))
    names = namespace(may_round=False)
    exec(program.exact, names)
    return Fraction(write(names[program.name](**{name: plain(one) for name, one in arguments.items()})))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a * 0.1 + a * 0.2", "3/10"),  # floats would say 0.30000000000000004
        ("return a / 3 * 3", "1"),
        ("x = a\n    x /= 8\n    x **= 2\n    return x", "1/64"),
        ("return 10 ** -1 + pow(a, 2)", "11/10"),
        ("return math.sqrt(a / 4) + sqrt(16)", "9/2"),
        ("return math.ceil(a / 3) + a // 1 + math.floor(7 / 2)", "5"),
        ("import math\n    total: int = sum([i for i in range(4) if i != a])\n    return int(total / 1)", "5"),
        ("x = []\n    while len(x) < 3:\n        x.append(a)\n    return max(x) if x else 0", "1"),
        ("return float(a) + Fraction(a, 3) + fractions.Fraction(2, 3)", "2"),
        ("'Docstring.'\n    for _ in range(2):\n        a += 1\n    return round(a / 1, 2)", "3"),
    ],
)
def test_arithmetic_is_exact(body: str, expected: str) -> None:
    assert value(f"import math\nfrom fractions import Fraction\ndef answer(a):\n    {body}", a=1) == Fraction(expected)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("```python\nimport os\ndef answer(a):\n    return a\n```", "imports: os"),
        ("def answer(a):\n    import subprocess\n    return a", "imports: subprocess"),
        ("from math import nothing\ndef answer(a): return a", "imports: nothing"),
        ("import math as m\ndef answer(a): return a", "imports under another name"),
        ("from . import os\ndef answer(a): return a", "imports: ."),
        ("def answer(a): return __import__('os')", "uses a constant that is no number"),
        ("def answer(a): return __builtins__", "uses the name: __builtins__"),
        ("def answer(a): return a.__class__", "uses the attribute: __class__"),
        ("def answer(a): return a + math.__dict__", "uses the attribute: __dict__"),
        ("def answer(a): return math.gamma(a)", "uses the attribute: gamma"),
        ("def answer(a): return a + math", "uses the name: math"),
        ("def answer(a): return open(a)", "uses the name: open"),
        ("def answer(a): return (lambda: a)()", "uses: Lambda"),
        ("def answer(a):\n  try: return a\n  except: return 0", "uses: Try"),
        ("def answer(a):\n  global x\n  return a", "uses: Global"),
        ("def answer(a): return f'{a}'", "uses: JoinedStr"),
        ("def answer(a):\n  def b(): return a\n  return b()", "uses: FunctionDef"),
        ("async def answer(a): return a", "no function in the reply"),
        ("class A: pass", "no function in the reply"),
        ("@staticmethod\ndef answer(a): return a", "has a decorator"),
        ("def answer(a=1): return a", "other parameters: 1 (a), expected a"),
        ("def answer(*a): return a", "other parameters: 0 (), expected a"),
        ("def answer(a, b): return a + b", "other parameters: 2 (a, b), expected a"),
        ("def answer(): return 3", "other parameters: 0 (), expected a"),
        ("def answer(a): return 3", "does not use: a"),
        ("def answer(a):\n  a = 3\n  return a", "overwrites: a"),
        ("def answer(a):\n  sum = a\n  return sum", "sets: sum"),
        ("def answer(a):\n  _divide = a\n  return a", "uses the name: _divide"),
        ("def answer(a): return a()", "calls: a"),
        ("def answer(a): return [max][0](a, a)", "calls what is no function"),
        ("def answer(a): return 1e999 * a", "uses a constant that is not finite"),
        ("def answer(a): return 3j * a", "uses a constant that is no number"),
        ("def one(a): return a\ndef two(a): return a", "not one function: 2"),
        ("def answer(a: return a", "not readable as a program: SyntaxError"),
        ("def answer(a): return " + "(" * 300 + "a" + ")" * 300, "not readable as a program: SyntaxError"),
        ("def answer(a): return " + "-" * 3900 + "a", "not readable as a program"),
        ("def answer(a): return a" + " + a" * 2000, "the program is too long"),
    ],
)
def test_what_may_not_run_is_refused(reply: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        read_program(f"Here:\n```\n{reply}\n```" if "@" in reply else reply, ["a"])
    assert str(refused.value).startswith(reason)


def test_what_surrounds_the_function_is_cut_off() -> None:
    reply = "Sure!\n\ndef answer(a: int) -> float:\n    # comment\n    return a / 2\n\nprint(answer(3))\nThis works."
    program = read_program(reply, ["a"])
    assert program.source == "def answer(a):\n    return a / 2"
    assert program.exact == "def answer(a):\n    return _divide(a, 2)"


def test_every_allowed_name_is_there() -> None:
    names = namespace(may_round=False)
    assert set(names) | set(names["__builtins__"]) >= FUNCTIONS | {"fabs", "pi"}
    assert set(vars(names["math"])) == MATH


def test_nothing_is_cut_off_or_rounded_unless_asked() -> None:
    for code in ("def answer(a): return int(a / 2)", "def answer(a): return round(a / 3, 2)"):
        with pytest.raises(ValueError, match="would"):
            value(code, a=1)
    assert namespace(may_round=True)["round"](Fraction(5, 2)) == 3
    assert namespace(may_round=True)["round"](Fraction(-25, 2)) == -13
    assert namespace(may_round=True)["round"](Fraction(1, 3), 2) == Fraction(33, 100)


def test_names_for_parameters() -> None:
    assert is_free_name("rolls_in_bag2")
    assert not any(map(is_free_name, ("sum", "math", "for", "X", "_x", "2x", "a" * 41, "a-b", "")))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.names[-1][0])
def test_the_examples_of_the_prompts_pass_the_gates_themselves(example: Example) -> None:
    numbers = find_numbers(example.question)
    lines = prompts.abstract(example.question)
    assert f"[{len(numbers)}: {numbers[-1].text}]" in lines[-1]["content"]
    names = "\n".join(f"{i}: {', '.join(name) if name else '-'}" for i, name in enumerate(example.names, 1))
    assert prompts.read_names(names, numbers) == example.parameters
    old = {p.name: p.number.value for p in example.parameters}
    gold = last_number(example.solution)
    assert {value(code, **old) for code in example.codes} == {gold}
    new = prompts.read_values("\n".join(example.values), example.parameters)
    assert len(new) == 5
    for values in new:
        assert isinstance(values, dict)
        assert not any(fits(p, values[p.name]) for p in example.parameters)
        assert value(example.codes[0], **values) >= 0
    reading = "\n".join(f"{i}: {name}" for i, name in enumerate(example.reading, 1))
    assert prompts.read_reading(reading, find_numbers(example.reworded)) == new[0]


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        ("1: a, count", "other marks: 1, expected 2"),
        ("1: a, count\n1: b, count", "other marks: 2, expected 2"),
        ("1: a, count\n2: a, count", "two numbers of one name"),
        ("1: a, thing\n2: b, count", "not name, kind: a, thing"),
        ("1: a, count\n2: sum, count", "not a name for a number: sum"),
        ("1: a, count\n2: b, count", "a count that is not whole: 2.5"),
        ("1: -\n2: -", "no number may change"),
    ],
)
def test_names_that_cannot_be_used(reply: str, wrong: str) -> None:
    assert prompts.read_names(reply, find_numbers("3 bags of 2.5 kg")) == wrong


def test_values_are_read_however_they_are_written() -> None:
    parameters = EXAMPLES[1].parameters
    replies = ("price=60, percent_off=25", "2. `price = $60,percent_off = 25%`", "- percent_off=25.0, price=60,")
    expected = {"price": 60, "percent_off": 25}
    assert all(prompts.read_values(f"Sure:\n{reply}\n", parameters) == [expected] for reply in replies)
    wrong = ("price=60", "price=60, percent_off=x", "price=60, price=61, percent_off=25")
    assert all(isinstance(prompts.read_values(reply, parameters)[0], str) for reply in wrong)
    named = prompts.read_names("**1**: `days`, count\n2: `egg_price`, amount", find_numbers(EXAMPLES[2].question))
    assert named == EXAMPLES[2].parameters


def test_the_form_of_examples_varies_with_the_seed() -> None:
    example = EXAMPLES[1]
    chats = {repr(prompts.program(example.question, example.parameters, seed)) for seed in range(20)}
    assert len(chats) > 10
    assert any("Fraction(" in chat for chat in chats)
    assert prompts.program(example.question, example.parameters, 3) == prompts.program(
        example.question, example.parameters, 3
    )
