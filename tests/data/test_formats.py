from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from luthier.core.errors import DataError
from luthier.data.formats import KINDS, check_messages, detect_kind, read_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "messages": {"messages": CHAT},
    "completion": {"prompt": "a", "completion": "b"},
    "preference": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
    "answer": {"prompt": "1+1", "answer": "2"},
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_and_detected(kind: str, tmp_path: Path) -> None:
    row = {**ROWS[kind], "source": "kept"}
    path = write(tmp_path / "rows.jsonl", row, "", row)
    assert list(read_rows(path)) == list(read_rows(path, kind)) == [row, row]
    assert detect_kind(row) == kind


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_parquet_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[kind]] * 3), path)
    assert list(read_rows(path)) == [ROWS[kind]] * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "row 3: not valid JSON"),
        ("[1]", "row 3: expected a JSON object, got list"),
        ({"txt": "a"}, r"row 3: no field 'text' \(did you mean 'txt'\?\), got txt"),
        ({"text": 7}, "row 3: field 'text': expected a string, got int 7"),
        ({"text": None}, "row 3: field 'text': expected a string, got NoneType"),
        ({"text": "a\ud800"}, "row 3: field 'text': half a surrogate pair at character 1"),
    ],
)
def test_errors_name_file_and_row(bad: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "fine"}, {"text": "fine"}, bad)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(path, "text"))
    assert str(path) in str(error.value)


def test_a_line_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="row 2: not valid JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of messages"),
        ("hi", "expected a list of messages, got str"),
        ([*CHAT, {"role": "gpt", "content": "x"}], "message 3: role 'gpt' is not one of"),
        ([{"role": "user"}], "message 1: expected role and content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: content: expected a string"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_messages(messages)


def test_files_that_cannot_be_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows are read from \.jsonl or \.parquet, got \.csv"):
        list(read_rows(write(tmp_path / "rows.csv", "a,b")))
    with pytest.raises(DataError, match=r"did you mean 'rows\.csv'"):
        list(read_rows(tmp_path / "row.csv"))
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(write(tmp_path / "empty.jsonl")))
    with pytest.raises(DataError, match="not a Parquet file"):
        list(read_rows(write(tmp_path / "wrong.parquet", "text")))
    with pytest.raises(DataError, match="did you mean 'messages'"):
        list(read_rows(tmp_path / "empty.jsonl", "message"))


def test_kinds_that_cannot_be_detected() -> None:
    with pytest.raises(DataError, match="fit several kinds: text, messages"):
        detect_kind({"text": "a", "messages": CHAT})
    with pytest.raises(DataError, match="no kind of row has the columns instruction, output"):
        detect_kind({"instruction": "a", "output": "b"})
