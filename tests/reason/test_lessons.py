"""Every lesson is right: the teacher's replies follow from what the pupil sees."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from luthier.data.problems import is_held_out
from luthier.reason.lessons import Lessons, strings
from luthier.reason.replies import read_steps
from luthier.tasks.answers import extract_answer

LESSONS = Lessons(count=400, lengths=(1, 6), seed=3)
ROWS = list(LESSONS.rows())


def rows(kind: str) -> Iterator[tuple[str, str, Any]]:
    for row in ROWS:
        if row["lesson"] == kind:
            yield row["messages"][0]["content"], row["messages"][-1]["content"], row


def truth(question: str) -> dict[str, int]:
    """Every value that follows, whatever the order of the statements."""
    values: dict[str, int] = {}
    open_statements = question.split(";")[:-1]
    while open_statements:
        left: list[str] = []
        for statement in open_statements:
            expression, name = sorted(statement.split("="), key=str.isalpha)
            try:
                values[name] = int(eval(expression, {}, values)) % 31  # the test's own text
            except NameError:
                left.append(statement)
        if left == open_statements:
            break
        open_statements = left
    return values


def test_all_kinds_are_taught_and_equal_settings_give_equal_lessons() -> None:
    assert {row["lesson"] for row in ROWS} == {
        "solve",
        "step",
        "decompose",
        "refine",
        "judge",
        "rewrite",
        "confidence",
        "drill",
        "find",
    }
    assert list(LESSONS.rows()) == ROWS


@pytest.mark.parametrize("kind", ["solve", "refine", "rewrite"])
def test_solutions_are_right_whatever_came_before(kind: str) -> None:
    for asked, reply, _ in rows(kind):
        question = asked.split("\n")[0]
        values = truth(question)
        assert extract_answer(reply) == str(values[question.split(";")[-1][:-1]])
        *lines, asked_again, _ = reply.split("\n")
        assert asked_again == question.split(";")[-1]
        for line in lines:
            statement, calculation, value = re.fullmatch(r"(.*):(.*)=(.*)", line).groups()
            assert statement in question.split(";")
            assert int(eval(calculation)) % 31 == int(value) == values[statement[-1]]


def test_drills_calculate_what_is_not_held_out() -> None:
    for asked, reply, _ in rows("drill"):
        given = asked.split("\n")[0].split(";")
        for calculation, line in zip(given, reply.split("\n"), strict=True):
            sign = next(sign for sign in "+-*" if sign in calculation)
            left, right = map(int, calculation.split(sign))
            assert line == f"{calculation}={int(eval(calculation)) % 31}"
            assert not is_held_out((sign, left, right), LESSONS.share)


def test_a_search_finds_the_statement_that_begins_with_the_name() -> None:
    for asked, reply, _ in rows("find"):
        statements, names, _ = asked.split("\n")
        for name, line in zip(names.split(";"), reply.split("\n"), strict=True):
            assert [s for s in statements.split(";") if s.startswith(name)] == [line]


def test_decompositions_say_what_the_solution_says() -> None:
    for asked, reply, _ in rows("decompose"):
        lines = asked.split("\n")[1:-3]
        stated = [(line.partition(":")[0][-1] + "?", line.rpartition("=")[2]) for line in lines]
        assert [(step.question, step.answer) for step in read_steps(reply)] == stated


def test_a_step_follows_from_the_stated_values() -> None:
    for asked, reply, _ in rows("step"):
        question, *given = asked.split("\n")
        values = {part.split("=")[0]: int(part.split("=")[1]) for part in question.split(";") if part[2:].isdigit()}
        values |= {q[3:-1]: int(a[3:]) for q, a in zip(given[:-2:2], given[1:-2:2], strict=True)}
        name = given[-2][3:-1]
        expression = next(part for part in question.split(";") if part.endswith(f"={name}"))[:-2]
        assert extract_answer(reply) == str(eval(expression, {}, values) % 31)


def test_short_problems_come_more_often() -> None:
    counts = Counter(row["length"] for row in ROWS)
    assert set(counts) == set(range(1, 7))
    assert counts[1] + counts[2] > counts[3] + counts[4] > counts[5] + counts[6]


def test_mistaken_solutions_are_context_and_not_learned() -> None:
    for _, _, row in rows("refine"):
        (first,) = [m for m in row["messages"][:-1] if m["role"] == "assistant"]
        assert first["weight"] == 0
        assert "Wait: " in first["content"]
        assert "weight" not in row["messages"][-1]


def test_judges_tell_right_from_wrong() -> None:
    scores = set()
    for asked, reply, _ in rows("judge"):
        question, *solution, _ = asked.split("\n")
        right = solution[-1] == f"####{truth(question)[question.split(';')[-1][:-1]]}"
        assert extract_answer(reply) == ("5" if right else "0")
        scores.add(right)
    assert scores == {True, False}


def test_nothing_held_out_is_ever_shown() -> None:
    shown = 0
    for row in ROWS:
        for line in "\n".join(message["content"] for message in row["messages"]).split("\n"):
            if found := re.search(r"(\d+)([-+*])(\d+)=\d", line):
                left, sign, right = found.groups()
                assert not is_held_out((sign, int(left), int(right)), LESSONS.share)
                shown += 1
    assert shown > 1000


TOKEN = re.compile(r"[-+*]\d+|=?[a-z]")


@pytest.mark.parametrize("longest", [2, 4, 90])
def test_a_string_is_said_again_from_one_of_its_tokens_on(longest: int) -> None:
    lengths, starts = set(), set()
    for row in strings(400, longest, 31, seed=0):
        lines = row["text"].split("\n")
        assert len(lines) == 6
        for said, again in zip(lines[::2], lines[1::2], strict=True):
            tokens = TOKEN.findall(said)
            assert "".join(tokens) == said
            assert said.endswith(again)
            assert len(TOKEN.findall(again)) > 1
            assert len(set(tokens)) == len(tokens)  # else what stands after one would not be known
            assert not re.search(r"(?<!=)[a-z]{2}", said)  # two names in a row would be one token
            lengths.add(len(tokens))
            starts.add(len(tokens) - len(TOKEN.findall(again)))
    assert min(lengths) == 2
    assert longest - 5 < max(lengths) <= longest
    assert len(starts) > longest / 2 - 1  # places cannot be counted
