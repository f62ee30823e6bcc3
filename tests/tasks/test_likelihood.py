from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.tasks.catalog import open_task
from luthier.tasks.likelihood import LikelihoodTask, Option, add_examples, joined, read_items
from luthier.tasks.task import Task

CHOICE = {"context": "The sky is", "choices": ["green", "blue"], "label": 1}
KINDS: list[tuple[dict[str, Any], str, list[tuple[str, str]], int]] = [
    (CHOICE, "choice", [("The sky is", " green"), ("The sky is", " blue")], 1),
    (
        {"contexts": ["He ate the cup. It", "He ate the cake. It"], "target": "was good.", "label": 1},
        "choice",
        [("He ate the cup. It", " was good."), ("He ate the cake. It", " was good.")],
        1,
    ),
    ({"good": "Who did it?", "bad": "Did it who?"}, "pair", [("", "Who did it?"), ("", "Did it who?")], 0),
    ({"sentence_good": "It is.", "sentence_bad": "It are."}, "pair", [("", "It is."), ("", "It are.")], 0),
    ({"context": "To be or not to", "target": "be"}, "target", [("To be or not to", " be")], 0),
    ({"context": "天気は", "target": "晴れ", "separator": ""}, "target", [("天気は", "晴れ")], 0),
]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "kind", "options", "label"), KINDS)
def test_every_kind_of_row_is_read(
    tmp_path: Path, row: dict[str, Any], kind: str, options: list[tuple[str, str]], label: int
) -> None:
    task = read_items(write(tmp_path / "items.jsonl", row))
    assert (task.name, task.kind) == ("items", kind)
    assert list(task.items[0].options) == [Option(*option) for option in options]
    assert task.items[0].label == label


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CHOICE | {"label": 2}, r"row 2: label is 2, expected a whole number from 0 to 1"),
        (CHOICE | {"label": "B"}, r"row 2: label is 'B'"),
        (CHOICE | {"label": True}, r"row 2: label is True"),
        (CHOICE | {"choices": ["blue"]}, r"row 2: choices is \['blue'\], expected a list of two or more"),
        (CHOICE | {"choices": ["blue", " "]}, r"row 2: choices is ' ', expected a text that is not blank"),
        (CHOICE | {"context": None}, r"row 2: context is None, expected a text"),
        (CHOICE | {"metadata": 3}, r"row 2: metadata is 3"),
        ({"query": "a", "choices": []}, r"row 2: no item to score, got query, choices"),
        ({"good": "a", "bad": "b"}, r"row 2: a pair row among choice rows"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "items.jsonl", CHOICE, row)
    with pytest.raises(DataError, match=f"items.jsonl {message}"):
        read_items(path)


def test_equal_ids_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two rows have the same id"):
        read_items(write(tmp_path / "a.jsonl", CHOICE | {"id": "x"}, CHOICE | {"id": "x"}))
    with pytest.raises(DataError, match="no rows"):
        read_items(write(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"read from .jsonl or .parquet, got .csv"):
        read_items(write(tmp_path / "c.csv"))


def test_the_rows_decide_whether_texts_are_scored_or_problems_solved(tmp_path: Path) -> None:
    scored, solved = (
        write(tmp_path / "s.jsonl", CHOICE, CHOICE),
        write(tmp_path / "p.jsonl", {"prompt": "1", "answer": "1"}),
    )
    assert isinstance(open_task(str(scored)), LikelihoodTask)
    assert isinstance(open_task(str(solved)), Task)
    one = open_task(str(scored), limit=1)
    assert isinstance(one, LikelihoodTask)
    assert len(one.items) == 1
    with pytest.raises(ConfigError, match=r"'clozee' is neither .* \(did you mean 'cloze'\?\)"):
        open_task("clozee")
    with pytest.raises(ConfigError, match="neither a task nor a file"):
        open_task("cloze:")


@pytest.mark.parametrize(
    ("context", "text", "whole"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a\n", "b", "a\nb"),
        ("a", " b", "a b"),
        ("a", "\nb", "a\nb"),
        ("", "b", "b"),
    ],
)
def test_white_space_at_the_border_is_never_doubled(context: str, text: str, whole: str) -> None:
    option = joined(context, text)
    assert option.whole == whole
    assert option.context == context


def test_bytes_are_those_of_the_text_alone() -> None:
    assert joined("a", "größe").num_bytes == len("größe".encode())
    assert Option("", " ").num_bytes == 1


def items(count: int, tmp_path: Path, name: str = "items") -> LikelihoodTask:
    rows = [{"context": f"{n} and one is", "choices": [str(n + 1), str(n + 2)], "label": 0} for n in range(count)]
    return read_items(write(tmp_path / f"{name}.jsonl", *rows))


def test_examples_stand_in_front_and_no_item_is_its_own(tmp_path: Path) -> None:
    task = items(4, tmp_path)
    shown = add_examples(task, 3, seed=5)
    for number, (item, before) in enumerate(zip(shown.items, task.items, strict=True)):
        *examples, last = item.options[0].context.split("\n\n")
        assert last == before.options[0].context
        assert sorted(examples) == [f"{n} and one is {n + 1}" for n in range(4) if n != number]
        assert item.options[0].text == before.options[0].text
        assert item.digest != before.digest
    assert add_examples(task, 3, seed=5) == shown
    assert add_examples(task, 3, seed=6) != shown
    assert add_examples(task, 0) is task


def test_examples_of_another_file(tmp_path: Path) -> None:
    task, pool = items(2, tmp_path), items(9, tmp_path, "dev")
    shown = add_examples(task, 9, pool=pool)
    assert shown.items[0].options[0].context.count("\n\n") == 9
    with pytest.raises(ConfigError, match="2 items give no 2 examples"):
        add_examples(task, 2)
    with pytest.raises(ConfigError, match="pairs have no context"):
        add_examples(LikelihoodTask("p", "pair", task.items), 1)


def test_the_hash_of_a_task_sees_texts_labels_and_order(tmp_path: Path) -> None:
    task = items(3, tmp_path)
    again = read_items(tmp_path / "items.jsonl")
    assert task.sha256 == again.sha256
    assert LikelihoodTask("other name", "choice", task.items).sha256 == task.sha256
    assert LikelihoodTask("items", "choice", task.items[::-1]).sha256 != task.sha256
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    other = read_items(write(tmp_path / "other.jsonl", rows[0] | {"label": 1}, *rows[1:]))
    assert other.sha256 != task.sha256
