from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.train.program_numbers import find_numbers, last_number, number_words, write_answer, write_like
from luthier.train.program_values import Kind, Parameter, draw_values, fits, masked, with_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1.2 litres", ["6/5"]),
        ("1,250.50 and 1,000,000", ["2501/2", "1000000"]),
        ("3/4 of 2 1/2, 2½ or ½", ["3/4", "5/2", "5/2", "1/2"]),
        ("-3, −4, (-5), =-6, -$5.20, $-7", ["-3", "-4", "-5", "-6", "-26/5", "-7"]),
        ("10-5=5, a 3-day trip, $5-$7", ["10", "5", "5", "3", "5", "7"]),
        ("20%, 5kg, $9. End.5", ["20", "5", "9", "5"]),
        ("Wait...5 or .5", ["5", "1/2"]),
        ("1,2 and 12,34", ["1", "2", "12", "34"]),
        ("at 5:30 on 3/4/2020 and 2020-03-04, v1.2.3, the 2nd, 1e5, B12, x2, 5/0", []),
        ("٣ and four", []),
    ],
)
def test_numbers_are_whole_and_exact(text: str, values: list[str]) -> None:
    assert [str(number.value) for number in find_numbers(text)] == values
    assert all(text[n.start : n.end] == n.text for n in find_numbers(text))


def test_the_last_number_is_the_last_thing_that_looks_like_one() -> None:
    assert last_number("3 + 4 = 7.\nAnswer: $1,007.50.") == Fraction(2015, 2)
    assert last_number("7 hours, at 5:30") is None
    assert last_number("none") is None


def test_number_words() -> None:
    assert number_words("Half a dozen, twice.") == {"1/2", "12", "2"} == number_words("double twelve halves")
    assert number_words("One of them; a second; it weighs") == frozenset()


@given(st.integers(-(10**6), 10**6), st.integers(0, 4))
def test_answers_are_written_exactly(numerator: int, places: int) -> None:
    value = Fraction(numerator, 10**places)
    assert last_number(write_answer(value)) == value
    assert Fraction(write_answer(value)) == value


def parameter(text: str, kind: Kind = "count", name: str = "x") -> Parameter:
    (number,) = find_numbers(text)
    return Parameter(name, kind, number)


@pytest.mark.parametrize(
    ("old", "new", "kind", "reason"),
    [
        ("30", "75", "count", ""),
        ("30", "299", "count", ""),
        ("30", "301", "count", "another order of magnitude"),
        ("30", "2", "count", "another order of magnitude"),
        ("300", "9", "count", "another order of magnitude"),
        ("30", "-30", "count", "another sign"),
        ("-3", "-8", "amount", ""),
        ("0", "3", "count", "another sign"),
        ("30", "30.5", "count", "not a whole number"),
        ("1.20", "2.75", "amount", ""),
        ("1.2", "2.75", "amount", "more places"),
        ("60", "120", "percent", "more than 100 %"),
        ("150", "120", "percent", ""),
        ("3/4", "2/3", "amount", ""),
        ("3/4", "5/3", "amount", "another kind of fraction"),
        ("3/4", "1/700", "amount", "another order of magnitude"),
        ("3/4", "100/701", "amount", "another kind of fraction"),
        ("2 1/2", "3", "amount", "mixed numbers are not changed"),
    ],
)
def test_what_may_take_the_place_of_a_number(old: str, new: str, kind: Kind, reason: str) -> None:
    assert fits(parameter(old, kind), Fraction(new)) == reason


@pytest.mark.parametrize("text", ["7", "-40", "1,250", "$0.99", "3/4", "7/3", "2½", "55%", "1,200.50", "0"])
def test_drawn_values_fit_and_are_read_as_they_are_written(text: str) -> None:
    number = find_numbers(f"It is {text} now")[0]
    one = Parameter("x", "percent" if "%" in text else "amount", number)
    drawn = [values["x"] for values, _ in zip(draw_values([one], 1), range(50), strict=False)]
    assert (len(drawn) > 5) == (text not in ("2½", "0"))
    for value in drawn:
        assert fits(one, value) == ""
        assert find_numbers(f"It is {write_like(number, value)} now")[0].value == value
    assert list(draw_values([one], 1))[:50] == [{"x": value} for value in drawn]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9999), min_size=2, max_size=4), st.integers(0, 1000))
def test_drawn_values_keep_their_order(old: list[int], seed: int) -> None:
    question = " and ".join(map(str, old))
    numbers = find_numbers(question)
    parameters = [Parameter(f"p{i}", "count", number) for i, number in enumerate(numbers)]
    for values, _ in zip(draw_values(parameters, seed), range(3), strict=False):
        new = [values[p.name] for p in parameters]
        assert sorted(range(len(old)), key=lambda i: (old[i], i)) == sorted(range(len(old)), key=lambda i: (new[i], i))
        assert [n.value for n in find_numbers(with_values(question, parameters, values))] == new


def test_only_the_places_of_parameters_change() -> None:
    question = "In 1999 Ann had 1,200 of 12 half-dozens; 12 went."
    numbers = find_numbers(question)
    parameters = [Parameter("had", "count", numbers[1]), Parameter("went", "count", numbers[3])]
    assert masked(question, parameters) == "In 1999 Ann had {had} of 12 half-dozens; {went} went."
    new = {"had": Fraction(3456), "went": Fraction(78)}
    assert with_values(question, parameters, new) == "In 1999 Ann had 3,456 of 12 half-dozens; 78 went."
