from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from luthier.core import files
from luthier.core.errors import DataError
from luthier.core.files import (
    append_jsonl,
    atomic_folder,
    atomic_write,
    promote_folder,
    read_json,
    read_jsonl,
    remove_leftovers,
    restore_folder,
    sha256_bytes,
    sha256_file,
    write_json,
)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    for content in ("old", b"new"):
        atomic_write(tmp_path / "a" / "b.txt", content)
    assert tree(tmp_path) == {"a/b.txt": "new"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "x", "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "x", "new")
    assert tree(tmp_path) == {"x": "old"}


def test_an_atomic_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "model") as partial:
            assert partial.parent == tmp_path
            (partial / name).write_text(name)
    assert tree(tmp_path) == {"model/second": "second"}


def test_an_error_inside_an_atomic_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "w").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model") as partial:
        shutil.copy(tmp_path / "absent", partial / "w")
    assert tree(tmp_path) == {"model/w": "old"}


def test_an_error_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "w").write_text("old")
    rename = Path.rename

    def fails_to_arrive(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and not self.name.endswith(files.OLD):
            full()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_to_arrive)
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "model") as partial:
        (partial / "w").write_text("new")
    assert tree(tmp_path) == {"model/w": "old"}


def crash_between_renames(folder: Path) -> None:
    """What a power cut in promote_folder leaves: the old folder moved aside, the new one under its temporary name."""
    folder.rename(folder.with_name(f".{folder.name}{files.OLD}"))
    (folder.parent / f".{folder.name}.77{files.TEMPORARY}").mkdir()


def test_restore_undoes_a_crash(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with atomic_folder(model) as partial:
        (partial / "w").write_text("old")
    crash_between_renames(model)
    restore_folder(model)
    assert (model / "w").read_text() == "old"
    restore_folder(model)
    assert (model / "w").read_text() == "old"


def test_removing_leftovers_keeps_the_only_version(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "w").write_text("old")
    crash_between_renames(tmp_path / "model")
    (tmp_path / f".env.json.77{files.TEMPORARY}").write_text("half")
    (tmp_path / f"step-00000004{files.TEMPORARY}").mkdir()
    (tmp_path / "thesis.partial").write_text("the user's")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"model/w": "old", "thesis.partial": "the user's"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "thesis.partial"]


def test_leftovers_of_a_finished_replacement_go(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / f".model{files.OLD}").mkdir()
    remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_promote_takes_a_folder_from_elsewhere_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").write_text("1")
    promote_folder(tmp_path / "new", tmp_path / "step-00000001")
    assert tree(tmp_path) == {"step-00000001/x": "1"}


def test_hashes() -> None:
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_jsonl_keeps_rows_and_unicode(tmp_path: Path) -> None:
    path, rows = tmp_path / "m.jsonl", [{"a": 1}, {"text": "zwei\u2028Zeilen\n"}, {"c": None}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_crash_at_any_byte_costs_one_row_at_most(tmp_path: Path, cut: int) -> None:
    """Cut inside the last row, also inside a letter of two bytes: the rows before stay, and appending goes on."""
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2, "t": "äöü"})
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    survivors = read_jsonl(path)
    assert survivors in ([{"step": 1}], [{"step": 1}, {"step": 2, "t": "äöü"}])
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [*survivors, {"step": 3}]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"b"\n{"c": 1}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        read_jsonl(tmp_path / "m.jsonl")
