from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError
from luthier.data.contamination import normalize
from luthier.data.problems import is_held_out
from luthier.data.word_problems import (
    Expression,
    Leaf,
    Operation,
    WordProblem,
    WordProblems,
    calculations,
    duplicates,
    evaluate,
    formula,
    leaks,
    leaves,
    perturb,
    problem_row,
    render,
    rewrite,
    verify,
    write_worked,
)
from luthier.data.word_templates import ONE_STEP, TWO_STEPS, Constant

TEMPLATES = (*ONE_STEP, *TWO_STEPS)
WORDS = {"a": "Ada", "b": "Ben", "c": "jars", "d": "pots", "x": "figs"}
HOW = WordProblems(seed=3, two_steps=0.5)
numbers = st.builds(Constant, st.integers(0, 99)) | st.builds(
    Leaf, st.integers(0, 9), st.integers(0, 99), st.just(0), st.just(0)
)
expressions = st.recursive(
    numbers, lambda inner: st.builds(Operation, st.sampled_from("+-*"), inner, inner), max_leaves=6
)


def some(count: int, **how: object) -> list[WordProblem]:
    return list(islice(HOW.draw("some", **how), count))  # type: ignore[arg-type]


@given(expressions)
def test_values_are_what_python_computes(expression: Expression) -> None:
    assert evaluate(expression) == eval(formula(expression))
    for sign, left, right, result in calculations(expression):
        assert result == eval(f"{left} {sign} {right}")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_leaves_point_to_their_numbers_in_questions_of_13_words(template: object) -> None:
    problem = render(template, WORDS, [17, 4, 3])  # type: ignore[arg-type]
    found = leaves(problem.expression)
    assert [problem.question[leaf.start : leaf.end] for leaf in found.values()] == [
        str(v.value) for v in found.values()
    ]
    assert [found[name].value for name in sorted(found)] == [17, 4, 3][: len(found)]
    assert len(normalize(problem.question)) >= 13
    assert "{" not in problem.question


def test_a_number_that_is_no_leaf_is_refused() -> None:
    with pytest.raises(DataError, match="has the numbers"):
        verify(WordProblem("Ada has 3 figs and 4 pens.", Leaf(0, 3, 8, 9)))
    with pytest.raises(DataError, match="has the numbers"):
        verify(WordProblem("Ada has 1.2 figs.", Leaf(0, 1, 8, 9)))
    with pytest.raises(DataError, match="has the numbers"):
        verify(WordProblem("Ada has 3 figs.", Leaf(0, 4, 8, 9)))


def test_solutions_are_worked_out_line_by_line() -> None:
    both = next(template for template in TEMPLATES if template.name == "more and both")
    problem = render(both, WORDS, [3, 4])
    assert (
        problem.question == "Ben has 3 figs. Ada has 4 figs more than Ben. How many figs do Ada and Ben have together?"
    )
    assert problem.worked == "3 + 4 = 7\n3 + 7 = 10\n#### 10"
    assert problem.bare == "#### 10"
    assert write_worked(calculations(problem.expression, {0: 1})) == "3 + 4 = 8\n3 + 8 = 11\n#### 11"
    row = problem_row(problem, "1", "train")
    assert (row["answer"], row["metadata"]["formula"], row["metadata"]["operations"]) == ("10", "(3 + (3 + 4))", 2)


@given(st.sampled_from(TEMPLATES), st.integers(0, 10**6), st.sampled_from([(2, 9), (2, 20)]))
def test_changed_problems_keep_to_the_constraints(template: object, seed: int, operands: tuple[int, int]) -> None:
    rng = random.Random(seed)
    values = [operands[1], *(rng.randint(*operands) for _ in range(2))]
    problem = render(template, WORDS, values)  # type: ignore[arg-type]
    changed = perturb(problem, rng, operands)
    assert changed is not None
    old, new = leaves(problem.expression), leaves(changed.expression)
    verify(changed)
    assert changed.question != problem.question
    for name, leaf in new.items():
        assert operands[0] <= leaf.value <= operands[1]
        assert len(str(leaf.value)) == len(str(old[name].value))
    assert all(result > 0 for *_, result in calculations(changed.expression))
    assert changed == render(template, WORDS, [new[n].value if n in new else 0 for n in range(3)])  # type: ignore[arg-type]
    assert rewrite(changed, {name: leaf.value for name, leaf in old.items()}) == problem


def test_nothing_is_changed_where_nothing_else_fits() -> None:
    twice = next(template for template in TEMPLATES if template.name == "twice")
    assert perturb(render(twice, WORDS, [9]), random.Random(0), (9, 12)) is None
    assert perturb(render(twice, WORDS, [5]), random.Random(0), (11, 20)) is None


def test_draws_are_decided_by_the_seed_and_the_purpose() -> None:
    assert some(50) == some(50)
    assert some(50)[:20] == some(20)
    assert list(islice(HOW.draw("other"), 50)) != some(50)
    assert list(islice(WordProblems(seed=4, two_steps=0.5).draw("some"), 50)) != some(50)


def test_splits_share_no_question_and_training_writes_no_held_out_calculation() -> None:
    drawn = {split: some(300, split=split, variants=2) for split in ("train", "questions", "pairs")}
    questions = [problem.question for problems in drawn.values() for problem in problems]
    assert not duplicates(questions)
    for split, problems in drawn.items():
        touched = [bool(leaks([problem.worked], 0.1)) for problem in problems]
        assert set(touched) == {split == "pairs"}
        assert {HOW.split_of(problem) for problem in problems} == {split}
        assert 0.2 < sum(len(calculations(p.expression)) == 2 for p in problems) / 300 < 0.8


def test_a_leak_and_a_duplicate_are_found() -> None:
    held = next((a, b) for a in range(2, 10) for b in range(2, 10) if is_held_out(("+", a, b), 0.1))
    text = f"Some words\n{held[1]} + {held[0]} = {sum(held)}\n#### {sum(held)}"
    assert leaks(["3 things", text], 0.1) == [f"{held[1]} + {held[0]}"]
    assert duplicates(["a", "b", "a", "a"]) == ["a", "a"]


def test_changed_versions_follow_their_problem_and_nothing_comes_twice() -> None:
    seen: set[str] = set()
    problems = some(400, variants=5, seen=seen)
    assert seen == {problem.question for problem in problems}
    masked = ["".join("#" if c.isdigit() else c for c in problem.question) for problem in problems]
    assert 4 < len(masked) / len(set(masked)) <= 6
    before = set(seen)
    assert not before & {problem.question for problem in some(100, seen=seen)}


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no more problems of the split 'pairs'"):
        next(WordProblems(held_pairs=0.0).draw("none", split="pairs"))
    with pytest.raises(ConfigError, match="operands: got"):
        WordProblems(operands=(2, 4))
    with pytest.raises(ConfigError, match=r"held_pairs: got 1\.0"):
        WordProblems(held_pairs=1.0)
