from __future__ import annotations

import random
from itertools import islice

import pytest

from luthier.core.errors import ConfigError
from luthier.data.curriculum import chat_row, mixed_texts, preference_row, write_mistaken
from luthier.data.formats import check_row
from luthier.data.stories import draw_stories
from luthier.data.word_problems import WordProblem, WordProblems, leaks

HOW = WordProblems(two_steps=0.5)


def problems(count: int) -> list[WordProblem]:
    return list(islice(HOW.draw("some"), count))


@pytest.mark.parametrize("maths", [0.0, 0.08, 0.6, 1.0])
def test_texts_have_the_share_of_maths_that_is_asked_for(maths: float) -> None:
    rows = mixed_texts(HOW.draw("some"), draw_stories("some", 0), 50_000, maths, 0)
    lengths = {part: sum(len(r["text"]) for r in rows if r["part"] == part) for part in ("problem", "story")}
    assert sum(lengths.values()) == pytest.approx(50_000, abs=1000)
    assert lengths["problem"] == pytest.approx(50_000 * maths, abs=500)
    assert rows == mixed_texts(HOW.draw("some"), draw_stories("some", 0), 50_000, maths, 0)
    half = [row["part"] for row in rows[: len(rows) // 2]]
    assert len(set(half)) == (2 if 0 < maths < 1 else 1)


def test_an_impossible_share_is_an_error() -> None:
    with pytest.raises(ConfigError, match="share of maths"):
        mixed_texts(HOW.draw("some"), draw_stories("some", 0), 100, 1.5, 0)


def test_conversations_are_worked_or_bare() -> None:
    (problem,) = problems(1)
    worked, bare = (check_row(chat_row(problem, bare=bare), "messages", "row") for bare in (False, True))
    assert worked["messages"][-1]["content"].endswith(f"\n{problem.bare}")
    assert bare["messages"][-1]["content"] == problem.bare
    assert worked["messages"][0] == bare["messages"][0] == {"role": "user", "content": problem.question}


def test_pairs_differ_in_style_or_in_being_right() -> None:
    rng = random.Random(0)
    for problem in problems(100):
        style, mistake = (preference_row(problem, contrast, rng, 0.1) for contrast in ("style", "mistake"))  # type: ignore[arg-type]
        for row in (style, mistake):
            check_row(row, "preference", "row")
            assert row["chosen"][0]["content"] == problem.worked
        assert style["rejected"][0]["content"] == problem.bare
        assert mistake["rejected"][0]["content"].rpartition("#### ")[2] != problem.answer


def test_mistakes_are_shorter_and_longer_and_hold_nothing_that_is_held_out() -> None:
    rng = random.Random(0)
    longer = set()
    for problem in problems(300):
        wrong = write_mistaken(problem, rng, 0.1)
        *lines, last = wrong.splitlines()
        assert last == f"#### {lines[-1].rpartition(' ')[2]}"
        assert int(last[5:]) > 0
        assert not leaks([wrong], 0.1)
        longer.add(wrong.count("\n") - problem.worked.count("\n"))
    assert longer == {-1, 0, 1}


def test_a_problem_without_a_possible_mistake_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no mistake fits"):
        write_mistaken(problems(1)[0], random.Random(0), 1.0)
