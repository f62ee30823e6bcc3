from __future__ import annotations

import pytest

from luthier.core.errors import DataError
from luthier.data.replies import learned_rows
from luthier.distill.lessons import make_lessons, prompt_encoder


def row(prompt, reply, **more):
    return {"prompt": prompt, "completion": reply, **more}


ROWS = [row("tap wood", "it rings"), row([{"role": "user", "content": "the bow"}], "maple"), row("tap wood", "until")]


def test_prompts_have_the_ids_of_fine_tuning(tokenizer):
    encode = prompt_encoder(tokenizer, raw=False)
    learned, _ = learned_rows(tokenizer, ROWS, 100, "rows")
    lessons = make_lessons(tokenizer, ROWS, ROWS, raw=False, longest=100)
    for lesson, other in zip(lessons.train, learned, strict=True):
        prompt = encode(lesson["prompt"])
        assert other["input_ids"][: len(prompt)] == prompt
        assert all(label == -100 for label in other["labels"][: len(prompt)])
        assert other["labels"][len(prompt)] != -100


def test_a_prompt_is_held_out_once_and_long_ones_are_counted(tokenizer):
    lessons = make_lessons(tokenizer, ROWS, ROWS, raw=False, longest=100)
    assert [kept["completion"] for kept in lessons.held_out] == ["it rings", "maple"]
    assert lessons.left_out == 0
    long = [*ROWS, row("tap " * 200, "wood")]
    assert make_lessons(tokenizer, long, ROWS, raw=False, longest=100).left_out == 1


def test_raw_prompts_are_continued_as_they_are(tokenizer):
    lessons = make_lessons(tokenizer, ROWS[:1], ROWS[:1], raw=True, longest=100)
    assert lessons.encode(lessons.train[0]["prompt"]) == tokenizer("tap wood")["input_ids"]
    with pytest.raises(DataError, match="texts, got messages"):
        make_lessons(tokenizer, ROWS, ROWS, raw=True, longest=100)


def test_more_than_one_reply_is_refused(tokenizer):
    two = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match="row 1: a completion must be one reply"):
        make_lessons(tokenizer, [row("tap", two)], ROWS, raw=False, longest=100)
