from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.data.formats import check_row
from luthier.data.long_documents import Needles, conversation_size, cut, names, random_part, sentences


def words(text: str) -> int:
    return len(text.split())


@given(st.text(alphabet=" .!?\n\"')Ab1", max_size=80))
def test_sentences_make_the_text_again(text: str) -> None:
    assert "".join(sentences(text)) == text


def test_sentences_end_where_sentences_end() -> None:
    text = 'He paid 3.50 dollars. "Why?" she asked.\nNew line\n\nParagraph without a stop\n\nLast!'
    assert [part.strip() for part in sentences(text)] == [
        "He paid 3.50 dollars.",
        '"Why?"',
        "she asked.",
        "New line",
        "Paragraph without a stop",
        "Last!",
    ]


def test_names_differ_and_stay() -> None:
    assert len(set(names(4900))) == 4900
    assert names(3) == names(5)[:3] == names(4900)[:3]
    with pytest.raises(ConfigError, match="names: got 4901"):
        names(4901)


@pytest.mark.parametrize("size", [len, words], ids=["characters", "words"])
@pytest.mark.parametrize("form", ["sentences", "pairs"])
def test_training_rows_fill_their_length_and_answer_rightly(size, form) -> None:
    needles = Needles(size=size, form=form, facts=3, questions=2, copy_share=0.0, digits=3)
    length = 700 if size is len else 120
    for number in range(20):
        row = needles.training_row(number, length)
        check_row(row, "messages", "row")
        assert length - 15 < conversation_size(row["messages"], size) <= length
        users, replies = row["messages"][::2], row["messages"][1::2]
        assert len(users) == len(replies) == 2
        for user, reply in zip(users, replies, strict=True):
            name = re.search(r"(\w+)\??$", user["content"])[1]
            told = re.search(rf"{name}(?: is )?(\d+)\.", users[0]["content"])[1]
            assert reply["content"] == (f" {name}{told}" if form == "pairs" else told)


@pytest.mark.parametrize("size", [len, words], ids=["characters", "words"])
def test_copy_rows_go_on_from_a_part_of_the_string_until_the_row_is_full(size) -> None:
    length = 400 if size is len else 90
    needles, periods, starts = Needles(size=size, copy_share=1.0, copy_words=9, digits=2, names=24), set(), set()
    for number in range(60):
        messages = needles.training_row(number, length)["messages"]
        used = conversation_size(messages, size)
        assert used <= length
        assert used > length - 10 or size is words  # a value alone counts as a word
        string, question = messages[0]["content"].split("\n")
        parts = re.findall(r" [A-Z][a-z]{3}|\d\d", string)
        assert "".join(parts) == string
        first = re.fullmatch(r"Copy from (\w+)\.", question)[1]
        said = [turn for turn, part in enumerate(parts) if part.strip() == first]
        going_on = ["".join(parts[turn:]) + string * 100 for turn in said]
        assert any(text.startswith(messages[1]["content"]) for text in going_on)
        assert not re.search(r"\d{3}", string)
        periods.add(len(parts))
        starts.add(said[0] > 0)
    assert periods == {4, 5, 6, 7, 8, 9}
    assert starts == {True, False}


def test_the_share_of_copy_rows_is_kept() -> None:
    rows = [Needles(copy_share=0.4).training_row(number, 500) for number in range(400)]
    copies = sum("\nCopy from " in row["messages"][0]["content"] for row in rows)
    assert 120 < copies < 200  # 4 standard deviations


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_test_row_has_its_fact_at_its_depth(depth: float) -> None:
    row = Needles(facts=1).test_row(0, 3000, depth)
    check_row(row, "answer", "row")
    before = row["prompt"].index(row["answer"]) / row["prompt"].rindex("\n")
    assert abs(before - depth) < 0.03
    assert row["metadata"] == {"length": 3000, "depth": depth, "facts": 1, "lead": ""}
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    assert 2980 < conversation_size(messages, len) <= 3000


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_lead_and_an_answer_are_the_fact_itself(depth: float) -> None:
    row = Needles(form="pairs").test_row(0, 500, depth)
    assert f"{row['metadata']['lead']}{row['answer']}." in row["prompt"]


def test_facts_stand_at_uniform_depth() -> None:
    needles = Needles(facts=1, questions=1, copy_share=0.0)
    depths = []
    for number in range(300):
        user, reply = needles.training_row(number, 2000)["messages"]
        depths.append(user["content"].index(reply["content"]) / len(user["content"]))
    assert abs(sum(depths) / 300 - 0.5) < 0.07
    assert abs(sum(depth < 0.25 for depth in depths) / 300 - 0.25) < 0.1


def test_rows_are_decided_by_seed_and_number() -> None:
    first, again, other = Needles(seed=1), Needles(seed=1), Needles(seed=2)
    assert [first.training_row(n, 500) for n in (3, 1)] == [again.training_row(n, 500) for n in (3, 1)]
    assert first.training_row(1, 500) != other.training_row(1, 500)
    assert first.training_row(1, 500) != first.training_row(2, 500)
    assert first.test_row(0, 500, 0.5) == again.test_row(0, 500, 0.5)


def test_filler_is_the_given_text_in_its_order() -> None:
    text = [f"Sentence {number} of the book. " for number in range(50)]
    user, _ = Needles(filler=text, copy_share=0.0).training_row(0, 600)["messages"]
    found = [int(number) for number in re.findall(r"Sentence (\d+) of", user["content"])]
    assert len(found) > 10
    assert all(b == (a + 1) % 50 for a, b in itertools.pairwise(found))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="length: got 20, but the facts and questions alone need"):
        Needles(copy_share=0.0).training_row(0, 20)
    with pytest.raises(ConfigError, match="length: got 30, but a string to copy alone"):
        Needles(copy_share=1.0).training_row(0, 30)
    with pytest.raises(ConfigError, match="questions, facts, names, digits: got 1, 11, 100, 1"):
        Needles(facts=11, digits=1)
    with pytest.raises(ConfigError, match="got 0, 4, 100, 5"):
        Needles(questions=0)
    with pytest.raises(ConfigError, match="copy_share"):
        Needles(copy_share=2)


TEXT = "".join(f"This is sentence number {number}. " for number in range(100))


def test_cut_keeps_whole_sentences() -> None:
    kept = cut(TEXT, 42, words)
    assert kept == "".join(sentences(TEXT)[:8])  # 5 words each
    assert cut(TEXT, 10_000, words) == TEXT


def test_parts_are_contiguous_on_sentence_borders_and_anywhere() -> None:
    rng = random.Random(0)
    starts = []
    for _ in range(200):
        part = random_part(TEXT, 20, 60, words, rng)
        assert 20 <= words(part) <= 60
        assert part in TEXT
        assert part.endswith(".")
        starts.append(int(re.search(r"number (\d+)", part)[1]))
    assert min(starts) < 10
    assert max(starts) > 80
    assert random_part("Too short.", 20, 60, words, rng) is None
    assert random_part("word " * 100, 20, 60, words, rng) is None  # one sentence, longer than a part
