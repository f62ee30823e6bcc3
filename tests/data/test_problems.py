from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.data.problems import draw_program, is_held_out, problem_row


@given(st.integers(1, 24), st.integers(0, 10**6), st.sampled_from(["chain", "tree"]))
def test_answers_are_what_python_computes(length: int, seed: int, form: str) -> None:
    program = draw_program(length, seed, form=form)  # type: ignore[arg-type]
    *assignments, asked = program.question.split(";")
    values: dict[str, int] = {}
    for assignment in assignments:
        expression, name = sorted(assignment.split("="), key=str.isalpha)
        left, sign, right = re.fullmatch(r"(\w+)(?:([-+*])(\w+))?", expression).groups()  # type: ignore[union-attr]
        a = values.get(left) if left in values else int(left)
        b = 0 if right is None else values.get(right) if right in values else int(right)
        assert a is not None
        assert b is not None
        values[name] = {"+": a + b, "-": a - b, "*": a * b, None: a}[sign] % program.modulus
    assert str(values[asked.removesuffix("?")]) == program.answer
    assert len(program.operations) == length == problem_row(program, "1", "train")["metadata"]["length"]


def test_splits_share_no_problem_and_no_held_out_calculation() -> None:
    drawn = {
        split: [draw_program(4, seed, split=split, share=0.1) for seed in range(300)]
        for split in ("train", "test", "held-out")
    }
    questions = {split: {program.question for program in programs} for split, programs in drawn.items()}
    assert not questions["train"] & questions["test"]
    for split, programs in drawn.items():
        touched = [any(is_held_out(triple, 0.1) for triple in program.triples()) for program in programs]
        assert set(touched) == {split == "held-out"}


def test_what_would_undo_a_mistake_is_not_drawn() -> None:
    for seed in range(200):
        program = draw_program(6, seed, form="tree")
        for operation, (sign, left, right) in zip(program.operations, program.triples(), strict=True):
            assert sign != "-" or operation.left != operation.right
            assert sign != "*" or 0 not in (left, right)


def test_statements_that_nothing_follows_from_change_no_answer() -> None:
    counts = set()
    for seed in range(100):
        plain, mixed = draw_program(5, seed), draw_program(5, seed, unused=4)
        assert mixed.answer == plain.answer
        *statements, asked = mixed.question.split(";")
        assert asked == plain.question.split(";")[-1]
        others = set(statements) - set(plain.statements)
        assert len(others) == len(statements) - len(plain.statements)
        assert all(statement[0] not in plain.values() and statement[-1] not in plain.values() for statement in others)
        counts.add(len(others))
    assert counts == set(range(5))


def test_shuffled_statements_are_the_same_in_another_order() -> None:
    plain, shuffled = draw_program(8, 1), draw_program(8, 1, shuffled=True)
    assert sorted(shuffled.written) == sorted(plain.statements)
    assert list(shuffled.written) != plain.statements
    assert draw_program(24, 1, form="chain", shuffled=True, unused=6).answer == draw_program(24, 1, form="chain").answer


def test_a_calculation_is_held_out_in_both_orders() -> None:
    pairs = [(left, right) for left in range(31) for right in range(31)]
    for sign in "+*":
        assert all(is_held_out((sign, a, b), 0.3) == is_held_out((sign, b, a), 0.3) for a, b in pairs)
    assert any(is_held_out(("-", a, b), 0.3) != is_held_out(("-", b, a), 0.3) for a, b in pairs)


def test_mistakes_go_on_to_the_steps_after_them() -> None:
    program = draw_program(5, 1, form="chain")
    right, wrong = program.values(), program.values({2: 3})
    names = [operation.name for operation in program.operations]
    assert [right[name] == wrong[name] for name in names[:3]] == [True, True, False]
    assert wrong[names[2]] == (right[names[2]] + 3) % program.modulus
    assert wrong[names[3]] == program.apply(program.operations[3], wrong)


@pytest.mark.parametrize(("length", "modulus"), [(0, 31), (25, 31), (3, 2)])
def test_what_cannot_be_drawn(length: int, modulus: int) -> None:
    with pytest.raises(ConfigError):
        draw_program(length, 0, modulus=modulus)
