from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.tasks.answers import extract_answer, final_text, normalize, number, same_quick


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("so <answer>1</answer> no <answer> 2 </answer>", "2"),
        (r"thus \boxed{\frac{1}{2}} and done", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("Reasoning.\n#### 1,234", "1,234"),
        ("The answer is 5.", "5"),
        ("**Answer:** 7", "7"),
        ("The final answer is: 8", "8"),
        ("<think>maybe <answer>1</answer></think>it is <answer>2</answer>", "2"),
        ("<think>maybe <answer>1</answer>", None),
        ("I do not know", None),
        ("<answer></answer>", None),
        ("", None),
        ("unanswered: 5", None),
    ],
)
def test_answers_are_found(reply: str, answer: str | None) -> None:
    assert extract_answer(reply) == answer


def test_a_thought_that_never_ends_leaves_nothing() -> None:
    assert final_text("<think>hm") == ""
    assert final_text("a</think>b") == "b"
    assert final_text("plain") == "plain"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$70$", 70),
        (r"\boxed{70}", 70),
        (r"70^\circ", 70),
        ("x=70", 70),
        ("070", 70),
        ("1,000", 1000),
        ("$1,000.50", Fraction(2001, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("32/29", Fraction(32, 29)),
        ("1 1/2", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("12 cm", 12),
        (r"12\text{ apples}", 12),
        ("\u22123", -3),
        ("70.", 70),
        ("5%", 5),
    ],
)
def test_numbers_in_any_dress(text: str, value: Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "NA", "1,2", "5x", "9^9", "1/0", "x", "1e5", "\u0663", "(1,2)", "9" * 300])
def test_what_is_no_plain_number(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0", "I do not know", False),  # what the published scorer calls right
        (r"\frac12", "0", False),
        ("The Dog", "dog.", True),
        ("dog", "cat", False),
        ("0.5", r"\frac{1}{2}", True),
        ("(1,2)", "1,2", None),
        ("(1, 2)", "(1,2)", True),
        ("x+1", "1+x", None),
        (r"\pi", "3.14", None),
        ("A", "a", True),
    ],
)
def test_quick_comparison(a: str, b: str, same: bool | None) -> None:
    assert same_quick(a, b) is same
    assert same_quick(b, a) is same


@given(st.fractions(), st.sampled_from(["{}", "${}$", r"\boxed{{{}}}", " {} ", "x = {}", r"\text{{{}}}", "{}."]))
def test_dress_never_changes_a_value(value: Fraction, dress: str) -> None:
    if len(str(value)) < 100:
        assert number(dress.format(value)) == value
        assert same_quick(dress.format(value), str(value)) is True


@given(st.text(), st.text())
def test_comparison_is_symmetric_and_reflexive(a: str, b: str) -> None:
    assert same_quick(a, a) is True
    assert same_quick(a, b) is same_quick(b, a)


def test_ten_thousand_hostile_strings_do_no_harm() -> None:
    pieces = ["<answer>", "</answer>", "\\boxed{", "}", "{", "\\frac", "$", "__import__('os').system('x')", "9^9^9^9"]
    pieces += [
        "\x00",
        "\ud800",
        "\u202e",
        "1,1,1",
        "####",
        "Answer:",
        "(" * 40,
        "\n",
        " ",
        "=",
        "/",
        "-",
        ".",
        "%",
        "a",
    ]
    pieces += ["<think>", "</think>", "\\text{", "\\circ", "^", "0" * 50, "1e999999", "lambda:0", "\\\\", "*" * 30, "`"]
    rng = random.Random(0)
    for _ in range(10_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
        answer = extract_answer(text)
        for candidate in (text, answer or ""):
            number(candidate), normalize(candidate), same_quick(candidate, "1")


def test_long_replies_are_read_quickly() -> None:
    for reply in ["\\boxed{" * 20_000, "<answer>" * 20_000, "the answer " * 20_000, " " * 100_000, "1," * 50_000]:
        extract_answer(reply), normalize(reply[:2000])
