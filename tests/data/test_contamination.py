from __future__ import annotations

import random

from luthier.data.contamination import RunIndex, check_contamination, normalize

LETTERS = [f"w{n}" for n in range(1000)]
ROWS = [" ".join(random.Random(n).sample(LETTERS, 20)) for n in range(10)]


def test_planted_rows_are_found_and_nothing_else() -> None:
    words = ROWS[3].split()
    texts = ["nothing at all", "Before. " + ", ".join(words[4:17]).upper() + "! After.", ROWS[7].replace(" ", "  ")]
    (found,) = check_contamination(texts, RunIndex({"test": ROWS}))
    assert (found.name, found.rows, found.hits, found.whole, found.share) == ("test", 10, 2, 1, 0.2)
    assert found.examples == (ROWS[3], ROWS[7])


def test_a_run_that_is_one_word_short_is_no_hit() -> None:
    words = ROWS[3].split()
    text = " ".join([*words[4:16], "other", *words[17:]])
    assert check_contamination([text], RunIndex({"test": ROWS}))[0].hits == 0
    assert check_contamination([text], RunIndex({"test": ROWS}, 12))[0].hits == 1


def test_short_rows_are_looked_for_as_a_whole() -> None:
    index = RunIndex({"short": ["What is 2 + 3?"], "empty": ["?"], "none": []})
    short, empty, none = check_contamination(["He asked: what is 2 + 3? Five."], index)
    assert (short.hits, short.whole) == (1, 0)
    assert (empty.hits, empty.whole, none.rows, none.share) == (0, 0, 0, 0.0)
    assert check_contamination(["what is 2 + 4"], index)[0].hits == 0


def test_whole_rows_alone() -> None:
    index = RunIndex({"test": ROWS}, 0)
    assert check_contamination([f"{ROWS[0]} more"], index)[0].whole == 0
    (found,) = check_contamination([ROWS[0], ROWS[0]], index)
    assert (found.hits, found.whole, found.examples) == (0, 1, (ROWS[0],))


def test_each_test_set_is_told_apart_and_examples_are_few() -> None:
    index = RunIndex({"first": ROWS, "second": [ROWS[0], ROWS[0]]})
    first, second = check_contamination(ROWS, index, examples=2)
    assert (first.hits, second.hits) == (10, 2)
    assert len(first.examples) == 2


def test_case_punctuation_and_space_do_not_count() -> None:
    assert normalize("It's  12,5 — Ünder_Score!") == ["it", "s", "12", "5", "ünder", "score"]
