from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from luthier.core.errors import DataError
from luthier.data import sources
from luthier.data.sources import TextSource
from luthier.tasks.catalog import open_task
from luthier.tasks.likelihood import LikelihoodTask
from luthier.tasks.text_tasks import TEXT_TASKS, cloze, last_word, open_text_task, sentences, word_order

WORDS = ["luthier", "plane", "spruce", "maple", "violin", "bow", "rings", "until", "softly", "wood", "top", "taps"]
CODE = ">>> for x in range(10): print(x, y[3], z.w)\n| a | 1 | 2 | 3 | 4 | 5 | 6 | 7 |\n"


def text(seed: int, count: int = 12) -> str:
    draw, paragraphs = random.Random(seed), list[str]()
    for _ in range(count):
        lines = []
        for _ in range(3):
            words = draw.choices(WORDS, k=draw.randint(9, 20))
            lines.append(" ".join([words[0].title(), *words[1:]]) + ".")
        paragraphs.append("\n".join(lines))
    return "\n\n".join([CODE, *paragraphs])


SOURCE = TextSource("books", tuple(text(seed) for seed in range(5)))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_text_gives_the_same_items_every_time(name: str) -> None:
    make = TEXT_TASKS[name]
    task = make(SOURCE)
    assert make(TextSource("books", SOURCE.documents)).sha256 == task.sha256
    assert make(TextSource("books", SOURCE.documents[:4])).sha256 != task.sha256
    assert len(make(SOURCE, 7).items) == 7
    assert [item.digest for item in make(SOURCE, 7).items] == [item.digest for item in task.items[:7]]
    assert len(task.items) > 100
    assert len({item.id for item in task.items}) == len(task.items)
    assert not any(">>>" in option.whole or "|" in option.whole for item in task.items for option in item.options)


def test_cloze_has_the_true_ending_and_three_of_other_documents() -> None:
    documents = [" ".join(document.split()) for document in SOURCE.documents]
    task = cloze(SOURCE)
    assert task.kind == "choice"
    for item in task.items:
        assert len({option.text for option in item.options}) == 4
        true = item.options[item.label]
        (home,) = [document for document in documents if true.whole in document]
        others = [option for place, option in enumerate(item.options) if place != item.label]
        assert not any(option.text in home for option in others)
        assert all(any(option.text in document for document in documents) for option in others)
        assert all(option.context == true.context for option in others)
        assert max(abs(len(option.text) - len(true.text)) for option in others) < 40  # length does not give it away
    assert {item.label for item in task.items} == {0, 1, 2, 3}


def test_word_order_swaps_two_inner_words() -> None:
    task = word_order(SOURCE)
    assert task.kind == "pair"
    for item in task.items:
        good, bad = (option.text.split() for option in item.options)
        moved = [place for place, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        assert len(moved) == 2
        assert sorted(good) == sorted(bad)
        assert (good[moved[0]], good[moved[1]]) == (bad[moved[1]], bad[moved[0]])
        assert 0 < moved[0] < moved[1] < len(good) - 1
        assert item.label == 0


def test_last_word_stands_in_the_text_after_its_context() -> None:
    documents = [" ".join(document.split()) for document in SOURCE.documents]
    task = last_word(SOURCE)
    assert task.kind == "target"
    for item in task.items:
        (option,) = item.options
        assert any(option.whole + "." in document for document in documents)
        assert option.text[1:].isalpha()


def test_a_corpus_follows_the_name(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(SOURCE.documents[0])
    task = open_task(f"cloze:{path}", limit=5)
    assert isinstance(task, LikelihoodTask)
    assert (task.name, len(task.items)) == (f"cloze:{path}", 5)  # one document: endings of its other sentences


def test_without_a_corpus_it_is_what_pretraining_holds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = tuple(text(seed, 6) for seed in range(60))
    monkeypatch.setitem(sources.NAMED, "python-prose", lambda: documents)
    task = open_text_task("last-word")
    held_out = sources.split(TextSource("python-prose", documents), 0.1, 6198)[1]
    assert 0 < len(held_out.documents) < 20
    assert task.name == "last-word"
    assert task.sha256 == last_word(held_out).sha256


def test_text_that_gives_no_items_is_refused() -> None:
    with pytest.raises(DataError, match="numbers: 0 sentences of 8 to 24 words, expected at least 8"):
        sentences(TextSource("numbers", ("1 2 3. 4 5 6.\n\n" * 100,)))
    chat = json.dumps([{"role": "user", "content": "Hi"}])
    with pytest.raises(DataError, match="conversations, expected text"):
        cloze(TextSource("chat", (chat,), conversations=True))
    alike = [f"Word{letter} and this is how each of them goes on until the end." for letter in "abcdefghij"]
    with pytest.raises(DataError, match="too few different sentences"):
        cloze(TextSource("alike", alike))
