from __future__ import annotations

import json

import pytest

from luthier.reason.prompts import Step
from luthier.reason.replies import Unreadable, after_evaluation, read_dependencies, read_score, read_steps, read_tag


def test_latex_in_json_survives() -> None:
    reply = r'{"steps": [{"question": "What is \frac{1}{2}?", "answer": "\sqrt{2} \times \theta \neq \beta"}]}'
    assert read_steps(reply) == [Step(r"What is \frac{1}{2}?", r"\sqrt{2} \times \theta \neq \beta")]


def test_escapes_that_json_means_survive() -> None:
    reply = r'{"steps": [{"question": "a\nb \"c\" \\frac", "answer": "\u0041"}]}'
    assert read_steps(reply) == [Step('a\nb "c" \\frac', "A")]


@pytest.mark.parametrize(
    "reply",
    [
        '```json\n{"steps": [{"question": "Q", "answer": "1/3"},]}\n```',
        'Here it is: {"steps": [{"question": "Q", "answer": 1/3}]} as asked',
        '[{"description": "Q", "answer": "1/3"}]',
        '<think>{"steps": []}</think>{"sub-questions": [{"sub_question": "Q", "answer": "1/3"}]}',
        "1. Q: Q\nA: 1/3\n",
    ],
)
def test_steps_as_models_write_them(reply: str) -> None:
    assert read_steps(reply) == [Step("Q", "1/3")]


def test_numbers_stay_as_written() -> None:
    assert read_steps('{"steps": [{"question": "Q", "answer": 1.10}]}') == [Step("Q", "1.10")]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("no", "there is no JSON"),
        ('{"steps": []}', "no steps"),
        ('{"steps": [{"question": "Q"}]}', "entry 1 has no answer"),
        ('{"steps": ["Q"]}', "entry 1 is not an object"),
        ('{"steps": [{"question": "Q", "answer": "1"', "not valid"),
        ("[" * 5000, "JSON"),
    ],
)
def test_what_is_wrong_is_said(reply: str, problem: str) -> None:
    with pytest.raises(Unreadable, match=problem):
        read_steps(reply)


def test_dependencies_only_point_back() -> None:
    first = {"question": "a", "answer": "1", "depends": [0, 1]}
    second = {"question": "b", "answer": "2", "depends": ["0", 7]}
    reply = json.dumps({"steps": [first, second]})
    assert [depends for _, depends in read_dependencies(reply)] == [(), (0,)]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<answer>4</answer>", 4),
        ("<answer>4/5</answer>", 4),
        ("5", 5),
        ("<answer>-1</answer>", None),
        ("<answer>7</answer>", None),
        ("<answer>high</answer>", None),
        ("I give it 5 of 5", None),
        ("", None),
    ],
)
def test_scores(reply: str, score: int | None) -> None:
    assert read_score(reply, 5) == score


def test_the_solution_follows_the_first_evaluation() -> None:
    assert after_evaluation("<evaluation>x</evaluation> new <answer>1</answer>") == "new <answer>1</answer>"
    assert after_evaluation("no tags") == "no tags"
    assert read_tag("<plan>a</plan><plan>b</plan>", "plan") == "b"
    assert read_tag("none", "plan") is None
