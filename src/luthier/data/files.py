"""Reading text files, with errors that say which file, which byte, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from luthier.core.errors import DataError, did_you_mean

END_OF_TEXT = "<|endoftext|>"  # alone on a line of a text file, it separates two documents
PIECE_BYTES = 8192  # about three printed pages: the length to which long documents are cut where cutting is wanted


def missing_path(path: Path, known: Iterable[str] = ()) -> DataError:
    """The error for a path that does not exist: names the nearest existing folder and the nearest name inside it.

    known: names that could have been meant instead of a file.
    """
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    child = path.relative_to(folder).parts[0]
    guess = did_you_mean(child, [*known, *sorted(entry.name for entry in folder.iterdir())])
    return DataError(
        f"{path}: no such file or folder{guess}",
        hint=f"check the path: {folder.resolve()} is the last folder of it that exists",
    )


def is_binary(path: Path) -> bool:
    """Whether a file is binary by the rule of git and grep: a zero byte near its beginning."""
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, line ends untouched.

    Raises: DataError with the offset of the first byte that is not UTF-8.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint=f"convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new-{path.name}",
        ) from error


def split_documents(text: str) -> list[str]:
    """Cut a text at the lines that hold nothing but `<|endoftext|>`; without such a line the text is one document."""
    documents, current = [], list[str]()
    for line in text.splitlines(keepends=True):
        if line.strip() == END_OF_TEXT:
            documents.append("".join(current))
            current = []
        else:
            current.append(line)
    documents.append("".join(current))
    return documents


def cut_paragraphs(document: str, size: int = PIECE_BYTES) -> list[str]:
    """Cut a document into pieces of about `size` UTF-8 bytes, which joined are the document.

    A piece ends after the first blank line past `size`, or after any line past four times `size`; a rest of less than
    half of `size` stays with the piece before it.
    """
    pieces, current, length = list[str](), list[str](), 0
    for line in document.splitlines(keepends=True):
        current.append(line)
        length += len(line.encode())
        if length >= 4 * size or (length >= size and not line.strip()):
            pieces.append("".join(current))
            current, length = [], 0
    rest = "".join(current)
    if pieces and 2 * length < size:
        return [*pieces[:-1], pieces[-1] + rest]
    return [*pieces, rest] if rest else pieces
