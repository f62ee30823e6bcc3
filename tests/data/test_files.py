from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.files import cut_paragraphs, is_binary, missing_path, read_text, split_documents


def test_line_ends_survive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\rthree\n\u00e9".encode())
    assert read_text(tmp_path / "a.txt") == "one\r\ntwo\rthree\n\u00e9"


def test_non_utf8_names_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text: byte 0xe9 at offset 3") as error:
        read_text(tmp_path / "latin.txt")
    assert "iconv" in error.value.hint


def test_missing_path_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    error = missing_path(tmp_path / "korpus" / "train.txt")
    assert "did you mean 'corpus'" in str(error)
    assert str(tmp_path) in error.hint


def test_documents_are_divided_at_separator_lines_only() -> None:
    assert split_documents("one\n<|endoftext|>\ntwo <|endoftext|> still two\n") == [
        "one\n",
        "two <|endoftext|> still two\n",
    ]
    assert split_documents("alone") == ["alone"]


def test_binary_is_a_zero_byte_near_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"PNG\0\0")
    (tmp_path / "words").write_bytes("é".encode())
    assert is_binary(tmp_path / "image")
    assert not is_binary(tmp_path / "words")


@given(st.lists(st.text(max_size=30)), st.integers(1, 64))
def test_pieces_joined_are_the_document(paragraphs: list[str], size: int) -> None:
    document = "\n\n".join(paragraphs)
    pieces = cut_paragraphs(document, size)
    assert "".join(pieces) == document
    assert all(2 * len(piece.encode()) >= size for piece in pieces[1:])


def test_pieces_end_with_paragraphs_where_there_are_any() -> None:
    assert cut_paragraphs("aaaa\nbbbb\n\ncc\n\nd", 6) == ["aaaa\nbbbb\n\n", "cc\n\nd"]
    assert cut_paragraphs("aaaa\n" * 10, 5) == ["aaaa\n" * 4, "aaaa\n" * 4, "aaaa\n" * 2]
    assert cut_paragraphs("aaaa\n\nb", 4) == ["aaaa\n\nb"]
