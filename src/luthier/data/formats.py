"""Rows: the five kinds that TRL and this package share, read from JSONL or Parquet.

| kind       | fields                       | used for                        |
|------------|------------------------------|---------------------------------|
| text       | text                         | pretraining, entropy            |
| messages   | messages                     | chat fine-tuning                |
| completion | prompt, completion           | fine-tuning                     |
| preference | prompt, chosen, rejected     | DPO                             |
| answer     | prompt, answer               | tasks with a checkable answer   |

Other columns are kept. `prompt`, `completion`, `chosen` and `rejected` are strings or, as in TRL, lists of messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError, did_you_mean, require
from luthier.data.files import missing_path

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "answer": ("prompt", "answer"),
}
ROLES = ("system", "user", "assistant")
FORMATS_HINT = "the kinds of rows are " + ", ".join(f"{kind} ({' + '.join(KINDS[kind])})" for kind in KINDS)


def read_rows(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `.jsonl` or `.parquet` file, checked one by one.

    kind: a key of KINDS, or None to detect it from the first row.
    Raises: DataError naming file and row (line of a JSONL file; counted from 1) for a missing file, broken JSON, a
    missing or mistyped field, a bad role, or a file without rows.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"unknown kind of rows {kind!r}{did_you_mean(kind, KINDS)}", hint=FORMATS_HINT)
    if not path.exists():
        raise missing_path(path)
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: rows are read from {' or '.join(READERS)}, got {path.suffix or 'no suffix'}",
            hint="write one JSON object per line to a .jsonl file",
        )
    number = 0
    for number, row in READERS[path.suffix](path):
        where = f"{path} row {number}"
        kind = kind or detect_kind(row, where)
        yield check_row(row, kind, where)
    if number == 0:
        raise DataError(f"{path}: no rows", hint="one JSON object per line is expected")


def detect_kind(row: Mapping[str, Any], where: str = "row") -> str:
    """The one kind whose fields the row has.

    Raises: DataError when no kind fits, or when several do.
    """
    fitting = [kind for kind, fields in KINDS.items() if all(field in row for field in fields)]
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(map(str, row)) or "nothing"
    if not fitting:
        raise DataError(f"{where}: no kind of row has the columns {columns}", hint=FORMATS_HINT)
    raise DataError(
        f"{where}: the columns {columns} fit several kinds: {', '.join(fitting)}",
        hint="name the kind, or remove the columns that are not meant",
    )


def check_row(row: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The row as a dict, once every field of the kind is present and well typed.

    Raises: DataError starting with `where`.
    """
    for field in KINDS[kind]:
        if field not in row:
            columns = ", ".join(map(str, row)) or "an empty row"
            raise DataError(
                f"{where}: no field {field!r}{did_you_mean(field, row)}, got {columns}",
                hint=f"a {kind} row needs {' and '.join(KINDS[kind])}",
            )
        _check_field(row[field], field, where)
    return dict(row)


def check_messages(messages: Any, where: str = "messages") -> list[dict[str, str]]:
    """The messages as a list of {role, content}, once roles and types are right.

    Raises: DataError starting with `where`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(
            f"{where}: expected a list of messages, got {_describe(messages)}",
            hint='messages look like [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]',
        )
    for number, message in enumerate(messages, 1):
        here = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"{here}: expected role and content, got {_describe(message)}", hint="add what is missing")
        if message["role"] not in ROLES:
            raise DataError(
                f"{here}: role {message['role']!r} is not one of {', '.join(ROLES)}",
                hint="rename the role (ShareGPT calls them human and gpt)",
            )
        _check_string(message["content"], f"{here}: content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check_field(value: Any, field: str, where: str) -> None:
    conversational = field not in ("text", "answer") and not isinstance(value, str)
    if field == "messages" or conversational:
        check_messages(value, f"{where}, field {field!r}")
    else:
        _check_string(value, f"{where}: field {field!r}")


def _check_string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, got {_describe(value)}", hint="write it as a JSON string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a surrogate pair at character {error.start}, which no UTF-8 text can hold",
            hint="the text was cut inside an emoji or similar when it was written: repair or remove the row",
        ) from error


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # covers UnicodeDecodeError, for a line that is not UTF-8
                raise DataError(
                    f"{path} row {number}: not valid JSON: {error}",
                    hint="one JSON object per line is expected, in UTF-8",
                ) from error
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{path} row {number}: expected a JSON object, got {_describe(row)}",
                    hint="one JSON object per line is expected",
                )
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    arrow = require("pyarrow", "train")
    parquet = require("pyarrow.parquet", "train")
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}", hint="the file is damaged or misnamed") from error
    number = 0
    with file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
