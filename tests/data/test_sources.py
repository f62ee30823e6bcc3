from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data import sources
from luthier.data.sources import TextSource, open_source, split

DOCUMENTS = tuple(f"document {number} " + "x" * (number % 7) for number in range(500))


def test_a_file_is_one_document_or_as_many_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("# Title\n\nText\n")
    (tmp_path / "two.txt").write_text("first\n<|endoftext|>\nsecond\n<|endoftext|>\n")
    assert open_source(str(tmp_path / "one.md")).documents == ("# Title\n\nText\n",)
    two = open_source(str(tmp_path / "two.txt"))
    assert two.documents == ("first\n", "second\n")
    assert two.note == "1 blank document left out"


def test_rows_with_text_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": " "}\n{"text": "b"}\n')
    assert open_source(str(path)).documents == ("a", "b")
    path.write_text('{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: no field 'text'"):
        open_source(str(path))


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "z.jsonl").write_text(json.dumps({"text": "z"}))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    source = open_source(str(tmp_path))
    assert source.documents == ("a", "b", "z")
    assert source.note == "1 binary file left out"


def test_what_cannot_be_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="no text in it"):
        open_source(str(tmp_path / "blank.txt"))
    with pytest.raises(DataError, match="no text files in it"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"did you mean 'blank\.txt'"):
        open_source(str(tmp_path / "blnk.txt"))
    with pytest.raises(DataError, match="did you mean 'python-prose'"):
        open_source("python-prosa")
    with pytest.raises(DataError, match="offset 3"):
        open_source(str(tmp_path))


def test_a_hub_id_is_loaded_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        return [{"text": f"{name} {split}"}] if name == "owner/name" else [{"body": "no text"}]

    monkeypatch.setattr(sources, "require", lambda module, extra: SimpleNamespace(load_dataset=load_dataset))
    assert open_source("owner/name").documents == ("owner/name train",)
    assert open_source("owner/name:test[:10%]").documents == ("owner/name test[:10%]",)
    with pytest.raises(DataError, match="owner/other row 1: no field 'text'"):
        open_source("owner/other")


def test_a_failing_hub_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(sources, "require", lambda module, extra: SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"neither a path here nor a dataset .*no network"):
        open_source("owner/name")


def test_split_is_a_partition_that_ignores_order_and_neighbors() -> None:
    train, rest = split(TextSource("s", DOCUMENTS), 0.1)
    assert sorted([*train.documents, *rest.documents]) == sorted(DOCUMENTS)
    assert 25 < len(rest.documents) < 75
    _, backwards = split(TextSource("s", DOCUMENTS[::-1]), 0.1)
    assert set(backwards.documents) == set(rest.documents)
    _, fewer = split(TextSource("s", DOCUMENTS[:300]), 0.1)
    assert set(fewer.documents) == set(rest.documents) & set(DOCUMENTS[:300])
    assert set(split(TextSource("s", DOCUMENTS), 0.1, seed=1)[1].documents) != set(rest.documents)


def test_equal_documents_stay_together() -> None:
    train, rest = split(TextSource("s", DOCUMENTS * 2), 0.3)
    assert not set(train.documents) & set(rest.documents)


@given(st.integers(0, 50), st.sampled_from([0.01, 0.1, 0.5, 0.99]))
def test_neither_side_is_ever_empty(seed: int, held_out: float) -> None:
    text = "".join(f"Paragraph {number} of the only file.\n\n" for number in range(60))
    train, rest = split(TextSource("file", (text,)), held_out, seed)
    assert train.documents
    assert rest.documents


def test_too_little_to_divide() -> None:
    with pytest.raises(DataError, match="4 bytes of text are too few to divide"):
        split(TextSource("tiny", ("word",)))
    with pytest.raises(DataError, match="must be between 0 and 1"):
        split(TextSource("s", DOCUMENTS), 0.0)
