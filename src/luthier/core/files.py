"""Files that are whole or absent: atomic writes, append-only rows, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from luthier.core.errors import DataError

TEMPORARY = ".partial"  # suffix of everything that a crash may leave behind
OLD = f".old{TEMPORARY}"  # suffix of a folder that is being replaced


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `path` when the block ends without an error.

    An existing folder is replaced: it is moved aside first and removed once the new one is in place, so that at every
    moment a whole version of it is on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        promote_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def promote_folder(temporary: Path, path: Path) -> None:
    """Put a finished temporary folder in its final place, replacing what is there."""
    for entry in temporary.rglob("*"):
        _sync(entry)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        restore_folder(path)
        raise
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Undo what a crash inside `promote_folder` may have left: put the version that was moved aside back."""
    if _aside(path).exists() and not path.exists():
        _aside(path).rename(path)


def remove_leftovers(folder: Path) -> None:
    """Clear what a crash left directly inside `folder`: half-written files and folders go, replaced ones come back."""
    for aside in folder.glob(f".*{OLD}"):
        restore_folder(aside.with_name(aside.name[1:].removesuffix(OLD)))
    for leftover in [*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"step-*{TEMPORARY}")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{OLD}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file; DataError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", hint="check the path") from error
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error})", hint="the file is damaged: restore or remove it"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    """Write one JSON object per line, atomically; returns the number of rows and the SHA-256 of the file."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    content = "".join(lines).encode()
    atomic_write(path, content)
    return len(lines), sha256_bytes(content)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; a single write, so that a crash tears at most the last line, which the next row replaces."""
    with path.open("a+b") as file:
        _close_last_line(file)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _close_last_line(file: BinaryIO) -> None:
    """End a last line that has no newline yet, or cut it off where it is torn."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole, newline, last = file.read().rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        file.truncate(len(whole + newline))
    else:
        file.write(b"\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; a torn last line, which a crash can leave, is ignored."""
    if not path.exists():
        return []
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number}: not valid JSON ({error})", hint="repair or remove the line"
            ) from error
    return rows
