"""Where text comes from: a corpus is a named sequence of documents with a hash.

`open_source` turns what a user writes (`python-prose`, a file, a folder, a hub id) into documents; `split` holds some
of them out for evaluation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from luthier.core.errors import DataError, require
from luthier.data.files import PIECE_BYTES, cut_paragraphs, is_binary, missing_path, read_text, split_documents
from luthier.data.formats import READERS, check_row, read_rows
from luthier.data.python_prose import python_prose
from luthier.data.template import render

NAMED: dict[str, Callable[[], Sequence[str]]] = {"python-prose": python_prose}  # corpora that need no file
TRAIN, HELD_OUT = "[train]", "[held out]"  # end the names of the parts of a corpus
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^/\\]+)?")
MIN_PIECE_BYTES = 256  # to which a short text is cut, so that some of it can be held out


@dataclass(frozen=True)
class TextSource:
    """A named sequence of documents, none of them blank, with a note to the user on what was left out, if anything."""

    name: str
    documents: Sequence[str]
    note: str = ""
    conversations: bool = False
    """Each document is a JSON list of messages."""

    def texts(self) -> Iterator[str]:
        """The documents as a model reads them: conversations in the chat format."""
        return (
            (render(json.loads(document)) for document in self.documents)
            if self.conversations
            else iter(self.documents)
        )

    @cached_property
    def sha256(self) -> str:
        """Identity of the text: a hash over the documents, their boundaries and their order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(frame(document))
        return digest.hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """Length of all documents in UTF-8 bytes."""
        return sum(len(document.encode()) for document in self.documents)


def frame(document: str) -> bytes:
    """A document as it enters a hash: its length in UTF-8 bytes (8 bytes, little-endian), then its bytes."""
    data = document.encode()
    return len(data).to_bytes(8, "little") + data


def open_source(spec: str) -> TextSource:
    """Read a corpus.

    spec: `python-prose`; a `.jsonl` or `.parquet` file whose rows have `text`, or `messages` (conversations); any other
    file, as UTF-8 text that is one document unless lines of `<|endoftext|>` divide it; a folder, whose files are read
    so one by one in the order of their names (hidden and binary files are left out, and the note says how many); or a
    hub dataset, `owner/name` or `owner/name:split` (the split defaults to train). What is on disk wins over the hub.

    Raises: DataError for a missing path, a file that is not UTF-8, a row without text, or a corpus without text.
    """
    path = Path(spec).expanduser()
    note = ""
    documents: Sequence[str]
    if spec in NAMED:
        documents = NAMED[spec]()
    elif path.is_dir():
        documents, note = _read_folder(path)
    elif path.exists():
        if path.suffix in READERS and (conversations := _read_conversations(path)):
            return TextSource(spec, conversations, conversations=True)
        documents = _read_file(path)
    elif HUB_ID.fullmatch(spec) and not path.parent.exists() and path.suffix not in (*READERS, ".txt", ".md"):
        documents = [check_row(row, "text", f"{spec} row {n}")["text"] for n, row in enumerate(load_hub(spec), 1)]
    else:
        raise missing_path(path, NAMED)
    return _make_source(spec, documents, note)


def _make_source(name: str, documents: Iterable[str], note: str) -> TextSource:
    documents = list(documents)
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise DataError(f"{name}: no text in it", hint="give a file, folder or dataset that contains text")
    notes = [note] if note else []
    if blank := len(documents) - len(kept):
        notes.append(f"{blank} blank document{'s' * (blank > 1)} left out")
    return TextSource(name, tuple(kept), "; ".join(notes))


def _read_conversations(path: Path) -> tuple[str, ...]:
    """The rows of a file of conversations, nothing for one of texts. Raises: DataError for one without a reply."""
    rows = READERS[path.suffix](path)
    first = next(iter(rows), None)
    if first is None or "messages" not in first[1] or "text" in first[1]:
        return ()
    documents = []
    for number, row in enumerate(read_rows(path, "messages"), 1):
        if not any(m["role"] == "assistant" and m.get("weight", 1) != 0 for m in row["messages"]):
            raise DataError(f"{path} row {number}: no reply to learn", hint="end the conversation with the assistant")
        documents.append(json.dumps(row["messages"], ensure_ascii=False))
    return tuple(documents)


def _read_file(path: Path) -> list[str]:
    if path.suffix in READERS:
        return [row["text"] for row in read_rows(path, "text")]
    return split_documents(read_text(path))


def _read_folder(folder: Path) -> tuple[list[str], str]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    readable = [path for path in files if path.suffix in READERS or not is_binary(path)]
    documents = [document for path in readable for document in _read_file(path)]
    if not documents:
        raise DataError(
            f"{folder}: no text files in it", hint="give a folder that contains UTF-8 text, .jsonl or .parquet"
        )
    binary = len(files) - len(readable)
    return documents, f"{binary} binary file{'s' * (binary > 1)} left out" if binary else ""


def load_hub(spec: str) -> Sequence[dict[str, object]]:
    """The rows of a hub dataset, `owner/name` or `owner/name:split`. Raises: DataError."""
    name, _, split_name = spec.partition(":")
    datasets = require("datasets", "train")
    try:
        rows: Sequence[dict[str, object]] = datasets.load_dataset(name, split=split_name or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that there is no dataset
        raise DataError(
            f"{spec}: neither a path here nor a dataset that could be loaded ({type(error).__name__}: {error})",
            hint="check the spelling and the network, or give a local file; a split is named as owner/name:split",
        ) from error
    return rows


def split(source: TextSource, held_out: float = 0.1, seed: int = 0) -> tuple[TextSource, TextSource]:
    """Divide a corpus into (training part, held-out part), by document.

    A document is held out when the hash of seed and text falls below `held_out`: the choice depends neither on the
    order nor on the other documents, equal documents stay together, and a growing corpus never moves one across. The
    share of bytes is therefore `held_out` on average only. If no document falls on one side, the nearest one does.
    A corpus of fewer than 1/held_out documents, such as a single file, is first cut into pieces of about 8 kB
    that end with a paragraph (smaller ones for a short text).

    Raises: DataError when there are not two different documents or paragraphs to divide.
    """
    if not 0 < held_out < 1:
        raise DataError(f"held-out share must be between 0 and 1, got {held_out}", hint="0.1 is usual")
    documents = source.documents
    if len(documents) < 1 / held_out:
        size = min(PIECE_BYTES, max(MIN_PIECE_BYTES, source.num_bytes // 20))
        documents = [piece for document in documents for piece in cut_paragraphs(document, size)]
    ranks = {document: _rank(document, seed) for document in documents}
    if len(ranks) < 2:
        raise DataError(
            f"{source.name}: {source.num_bytes} bytes of text are too few to divide into training and held-out text",
            hint="give more text, in lines",
        )
    lowest, threshold = min(ranks.values()), min(held_out, max(ranks.values()))
    train: list[str] = []
    rest: list[str] = []
    for document in documents:
        (rest if ranks[document] < threshold or ranks[document] == lowest else train).append(document)
    return (
        TextSource(f"{source.name} {TRAIN}", tuple(train), source.note, source.conversations),
        TextSource(f"{source.name} {HELD_OUT}", tuple(rest), source.note, source.conversations),
    )


def _rank(document: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{document}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
