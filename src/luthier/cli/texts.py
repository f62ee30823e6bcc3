"""Text as the verbs that score it take it: a corpus by its name, its first documents, and pieces for intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.data.sources import TextSource


def open_text(spec: str, tokenizer: PreTrainedTokenizerFast) -> TextSource:
    """A corpus as text; token shards are decoded. Raises: DataError for conversations, of which only replies count."""
    from luthier.core.errors import DataError
    from luthier.data.shards import TokenShards
    from luthier.data.sources import TextSource, open_source

    if not (Path(spec) / "index.json").is_file():
        source = open_source(spec)
        if source.conversations:
            raise DataError(
                f"{spec}: conversations, expected text", hint="luthier pretrain scores their replies; see its report"
            )
        return source
    shards = TokenShards.open(Path(spec), tokenizer)
    return TextSource(name=shards.name, documents=list(shards.decode_documents(tokenizer)))


def first_documents(source: TextSource, max_bytes: int) -> TextSource:
    """The first whole documents of a corpus up to a size in UTF-8 bytes, but at least one; 0: all of it."""
    if not max_bytes:
        return source
    kept, size = list[str](), 0
    for document in source.documents:
        size += len(document.encode())
        if kept and size > max_bytes:
            break
        kept.append(document)
    return type(source)(name=source.name, documents=kept)


def opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The token that opens a document, for models that have one of its own (others take the EOS before it)."""
    bos = tokenizer.bos_token_id
    return [] if bos is None or bos == tokenizer.eos_token_id else [bos]
