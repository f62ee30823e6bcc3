"""Token shards: a corpus as token ids on disk, memory-mapped, so that its size is bounded by the disk alone.

A shard folder holds, without headers and in little-endian order:

- `tokens.bin`: all token ids, document after document, each with its EOS: uint16, or uint32 for ids above 65,535;
- `documents.bin`: one int64 pair per document: the index one past its last token, and its length in UTF-8 bytes
  (padding between conversations is a document of no bytes);
- `mask.bin`, for conversations only: one byte per token, 1 where the model has to write it;
- `index.json`: format version, dtype, counts, and the hashes of the tokenizer, the text and the tokens.

`tokens.bin` alone is what OLMo and Instella train on (under names in `.npy`): `TokenShards.from_raw` reads theirs.

Departure from Instella, whose windows of T tokens have T - 1 targets: a window here is T input positions and the token
after them, so that neighboring windows share one token and every token but the first is a target once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.core.files import atomic_folder, read_json, write_json
from luthier.data.chat import encode_chat
from luthier.data.files import missing_path
from luthier.data.sources import frame
from luthier.data.tokenizer import decode_text, encode_documents, num_ids, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1
IGNORED = -100  # a target that does not count
MASK: np.dtype[Any] = np.dtype("u1")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
DOCUMENT: np.dtype[Any] = np.dtype("<i8")
BATCH_CHARACTERS = 1 << 20  # text that is tokenized at once; bounds the memory of write_shards


@dataclass(frozen=True, eq=False)
class TokenShards:
    """Memory-mapped token ids [num_tokens] with document boundaries. Make one with write_shards, open or from_raw."""

    name: str
    tokens: NDArray[np.unsignedinteger] = field(repr=False)  # [num_tokens]
    documents: NDArray[np.int64] | None = field(repr=False)  # [num_documents, 2]: token end, UTF-8 bytes
    tokenizer_sha256: str
    source_sha256: str
    sha256: str  # of the token ids
    mask: NDArray[np.uint8] | None = field(default=None, repr=False)  # [num_tokens]: 1 on the tokens to learn
    align: int = 0  # conversations do not cross multiples of so many tokens; 0: they may

    @classmethod
    def open(cls, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> TokenShards:
        """Map a folder that `write_shards` made.

        Raises: DataError when a file is missing or has another size than the index says, or when `tokenizer` is not
        the one that made the tokens.
        """
        index = _read_index(folder)
        shards = cls(
            name=index["source"],
            tokens=_map(folder / "tokens.bin", DTYPES[index["dtype"]], (index["tokens"],)),
            documents=_map(folder / "documents.bin", DOCUMENT, (index["documents"], 2)),
            tokenizer_sha256=index["tokenizer_sha256"],
            source_sha256=index["source_sha256"],
            sha256=index["tokens_sha256"],
            mask=_map(folder / "mask.bin", MASK, (index["tokens"],)) if index.get("mask") else None,
            align=index.get("align", 0),
        )
        if tokenizer is not None:
            shards.check_tokenizer(tokenizer)
        return shards

    @classmethod
    def from_raw(cls, path: Path, *, dtype: str = "uint16", tokenizer_sha256: str = "") -> TokenShards:
        """Map a file of nothing but token ids, such as the `.npy`-named ones of OLMo and Instella.

        Its document boundaries are unknown, and its hash covers the size and the first and last MiB, not all of it.
        Raises: DataError for a missing or empty file, a broken size, or a file that has a NumPy header after all.
        """
        if dtype not in DTYPES:
            raise DataError(f"unknown dtype of tokens {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
        if not path.exists():
            raise missing_path(path)
        size, item = path.stat().st_size, DTYPES[dtype].itemsize
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            tail = file.read()
        if head.startswith(b"\x93NUMPY"):
            raise DataError(f"{path}: has a NumPy header, expected bare token ids", hint="np.load it and use .tofile()")
        if size == 0 or size % item:
            raise DataError(f"{path}: {size} bytes are no whole number of {dtype} tokens", hint="check the dtype")
        digest = hashlib.sha256(b"%d" % size + head + tail).hexdigest()
        tokens = _map(path, DTYPES[dtype], (size // item,))
        return cls(path.name, tokens, None, tokenizer_sha256, source_sha256="", sha256=digest)

    @property
    def num_tokens(self) -> int:
        """Tokens, each document's EOS included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents. Raises: DataError for raw tokens."""
        return len(self.boundaries())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text. Raises: DataError for raw tokens."""
        return int(self.boundaries()[:, 1].sum())

    def num_windows(self, length: int) -> int:
        """How many windows of `length` input positions there are; what is left at the end is dropped."""
        return max(0, len(self.tokens) - 1) // length

    def window(self, index: int, length: int) -> NDArray[np.int64]:
        """The token ids [length + 1] of one window: inputs are all but the last, targets all but the first.

        Raises: IndexError beyond `num_windows`.
        """
        if not 0 <= index < self.num_windows(length):
            raise IndexError(f"window {index} of {self.num_windows(length)}")
        return self.tokens[index * length : index * length + length + 1].astype(np.int64)

    def window_targets(self, index: int, length: int) -> NDArray[np.int64]:
        """The targets [length] of one window: the tokens after its inputs, IGNORED where there is nothing to learn."""
        targets = self.window(index, length)[1:]
        if self.mask is not None:
            targets[self.mask[index * length + 1 : index * length + length + 1] == 0] = IGNORED
        return targets

    def window_document_ids(self, index: int, length: int) -> NDArray[np.int64]:
        """Which document each input position [length] of a window belongs to, counted from 0 within the window.

        Raises: DataError for raw tokens.
        """
        positions = np.arange(index * length, (index + 1) * length)
        documents = np.searchsorted(self.boundaries()[:, 0], positions, side="right")
        return documents - documents[0]

    def document(self, index: int) -> NDArray[np.int64]:
        """Token ids of one document, EOS included. Raises: DataError for raw tokens."""
        ends = self.boundaries()[:, 0]
        return self.tokens[ends[index - 1] if index else 0 : ends[index]].astype(np.int64)

    def decode_documents(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
        """The text of every document; with a lossless tokenizer, exactly what was written, conversations as rendered.

        Raises: DataError when the tokenizer is not the one that made the tokens, or for raw tokens.
        """
        self.check_tokenizer(tokenizer)
        for index, (_, num_bytes) in enumerate(self.boundaries().tolist()):
            if self.align and num_bytes == 0:
                continue  # padding
            yield decode_text(tokenizer, self.document(index)[:-1].tolist())

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise DataError unless these tokens were made by this tokenizer."""
        digest = tokenizer_digest(tokenizer)
        if digest != self.tokenizer_sha256:
            raise DataError(
                f"the tokens of {self.name} were made by tokenizer {self.tokenizer_sha256 or 'unknown'}, got {digest}",
                hint="tokenize the text again with this tokenizer, or use the model that belongs to the tokens",
            )

    def boundaries(self) -> NDArray[np.int64]:
        """One row per document: index one past its last token, UTF-8 bytes. Raises: DataError for raw tokens."""
        if self.documents is None:
            raise DataError(
                f"{self.name}: raw tokens, whose document boundaries are unknown",
                hint="tokenize the text with luthier, or do without document boundaries",
            )
        return self.documents


def write_shards(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    source: str,
    conversations: bool = False,
    align: int = 0,
) -> TokenShards:
    """Tokenize documents into a shard folder, about a megabyte of text in memory at a time, and open it.

    source: the name of the corpus, for messages and provenance. The folder appears whole or not at all, and replaces an
    earlier one. The hash of the text equals `TextSource.sha256` of the same documents.

    conversations: each document is a JSON list of messages; the mask says which tokens are replies, and the length in
    bytes is that of the replies. align: conversations do not cross multiples of so many tokens (padding fills up), so
    that no window begins inside one; those longer than that are cut.

    Raises: DataError when there are no documents.
    """
    dtype = "uint16" if num_ids(tokenizer) <= 1 << 16 else "uint32"
    text_hash, token_hash = hashlib.sha256(), hashlib.sha256()
    num_tokens = num_documents = num_bytes = 0
    encode = _encode_conversations if conversations else _encode_texts
    names = ("tokens.bin", "documents.bin", "mask.bin")[: 3 if conversations else 2]
    with atomic_folder(folder) as partial:
        with contextlib.ExitStack() as files:
            tokens, boundaries, *masks = [files.enter_context((partial / name).open("wb")) for name in names]
            for text, ids, mask, length in encode(tokenizer, documents):
                gap = _gap(num_tokens, len(ids), align)
                data = np.asarray([tokenizer.pad_token_id] * gap + ids, DTYPES[dtype]).tobytes()
                text_hash.update(frame(text))
                token_hash.update(data)
                tokens.write(data)
                for file in masks:
                    file.write(np.asarray([0] * gap + mask, MASK).tobytes())
                ends = [[num_tokens + gap, 0]] if gap else []
                num_tokens += gap + len(ids)
                num_documents += len(ends) + 1
                num_bytes += length
                boundaries.write(np.asarray([*ends, [num_tokens, length]], DOCUMENT).tobytes())
        if num_documents == 0:
            raise DataError(f"{source}: no documents to tokenize", hint="give a corpus that contains text")
        index = {"format": FORMAT_VERSION, "dtype": dtype, "tokens": num_tokens, "documents": num_documents}
        index |= {"bytes": num_bytes, "source": source, "source_sha256": text_hash.hexdigest()}
        index |= {"tokenizer_sha256": tokenizer_digest(tokenizer), "tokens_sha256": token_hash.hexdigest()}
        write_json(partial / "index.json", index | ({"mask": True, "align": align} if conversations else {}))
    return TokenShards.open(folder)


def _gap(position: int, length: int, align: int) -> int:
    """Padding before a conversation, so that it does not cross a multiple of `align`."""
    if not align:
        return 0
    left = -position % align
    return left if left < length else 0


Encoded = tuple[str, list[int], list[int], int]


def _encode_texts(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[Encoded]:
    """(text, ids, no mask, length in bytes) of each text."""
    for batch in _batches(documents):
        for text, ids in zip(batch, encode_documents(tokenizer, batch), strict=True):
            yield text, ids, [], len(text.encode())


def _encode_conversations(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[Encoded]:
    """(text, ids, mask, length of the replies in bytes) of each conversation."""
    for text in documents:
        messages = json.loads(text)
        ids, mask = encode_chat(tokenizer, messages)
        replies = (m for m in messages if m["role"] == "assistant" and m.get("weight", 1) != 0)
        yield text, ids, mask, sum(len(message["content"].encode()) for message in replies)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise missing_path(folder)
    index = read_json(folder / "index.json")
    if not isinstance(index, dict) or index.get("format") != FORMAT_VERSION:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise DataError(
            f"{folder}: token shards of format {got}, expected {FORMAT_VERSION}",
            hint="tokenize the text again with this version of luthier",
        )
    return index


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    expected = int(np.prod(shape)) * dtype.itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise DataError(
            f"{path}: {'truncated' if size < expected else 'too long'}: {size} bytes, but the index says {expected}",
            hint="remove the folder and tokenize the text again",
        )
    return np.memmap(path, dtype, mode="r", shape=shape)
