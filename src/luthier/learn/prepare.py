"""From text to what training reads: a tokenizer, token shards to train on, and held-out token shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import ConfigError, DataError
from luthier.core.files import atomic_folder
from luthier.data.shards import TokenShards, write_shards
from luthier.data.sources import TextSource, split
from luthier.data.tokenizer import load_tokenizer, num_ids, tokenizer_digest, train_bpe
from luthier.learn.evaluate import TokenStream


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, what it made of each training corpus, and the held-out text."""

    tokenizer: PreTrainedTokenizerFast
    training: list[TokenShards]
    held_out: TokenShards


def prepare_text(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerFast | None,
    folder: Path,
    *,
    held_out: float,
    vocab_size: int,
    seed: int,
    sequence_length: int = 0,
) -> Corpus:
    """Split each corpus by document, train a tokenizer unless one is given, and write token shards to `folder`.

    Conversations are laid out so that none crosses the border of a window of `sequence_length` tokens. Shards of the
    same text and tokenizer that are already there are kept, so a resumed run starts at once.
    """
    parts = [split(source, held_out, seed) for source in sources]
    kept_tokenizer = folder / "tokenizer"
    if tokenizer is None and (kept_tokenizer / "tokenizer.json").exists():
        tokenizer = load_tokenizer(kept_tokenizer)
    if tokenizer is None:
        tokenizer = train_bpe((text for training, _ in parts for text in training.texts()), vocab_size)
    if not (kept_tokenizer / "tokenizer.json").exists():
        with atomic_folder(kept_tokenizer) as partial:
            tokenizer.save_pretrained(partial)
    for index, (training, _) in enumerate(parts):
        _write(training, tokenizer, folder / f"train-{index}", align=sequence_length)
    _write(_joined([rest for _, rest in parts]), tokenizer, folder / "held-out")
    return open_corpus(folder, len(sources))


def open_corpus(folder: Path, num_sources: int) -> Corpus:
    """What `prepare_text` wrote; every rank opens it after the main one has written it."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    training = [TokenShards.open(folder / f"train-{index}", tokenizer) for index in range(num_sources)]
    return Corpus(tokenizer, training, TokenShards.open(folder / "held-out", tokenizer))


def _joined(parts: Sequence[TextSource]) -> TextSource:
    if len(parts) == 1:
        return parts[0]
    documents = [document for part in parts for document in part.documents]
    kinds = {part.conversations for part in parts}
    if len(kinds) > 1:
        raise DataError(
            "the corpora are texts and conversations, which have no common held-out measure",
            hint="train on texts first, then on conversations",
        )
    name = " + ".join(part.name for part in parts)
    return TextSource(name=name, documents=documents, conversations=kinds.pop())


def _write(source: TextSource, tokenizer: PreTrainedTokenizerFast, folder: Path, *, align: int = 0) -> None:
    align = align if source.conversations else 0
    if (folder / "index.json").exists():
        there = TokenShards.open(folder)
        wanted = (source.sha256, tokenizer_digest(tokenizer), align)
        if (there.source_sha256, there.tokenizer_sha256, there.align) == wanted:
            return
    write_shards(
        source.documents, tokenizer, folder, source=source.name, conversations=source.conversations, align=align
    )


def token_stream(shards: TokenShards) -> TokenStream:
    """Held-out shards as the stream that is scored. Raises DataError for raw tokens, whose bytes are unknown."""
    boundaries = shards.boundaries()
    return TokenStream(
        tokens=np.asarray(shards.tokens, dtype=np.int64),
        starts=np.concatenate([[0], boundaries[:-1, 0]]),
        num_bytes=np.asarray(boundaries[:, 1]),
        mask=None if shards.mask is None else np.asarray(shards.mask),
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """ConfigError when the embedding has fewer rows than the tokenizer has ids."""
    if (needed := num_ids(tokenizer)) > rows:
        raise ConfigError(
            f"vocab_size: got {rows} rows, but the tokenizer has {needed} ids",
            hint=f"set vocab_size to {needed} or more, or use another tokenizer",
        )
