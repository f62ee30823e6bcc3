"""The corpora of the training verbs: text, which is split and tokenized, or token shards made earlier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from luthier.core.console import Console
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.learn.parallel import Ranks
    from luthier.learn.prepare import Corpus


class CorpusSettings(Protocol):
    """What a verb's config says about its corpora."""

    @property
    def out(self) -> Path: ...
    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def eval_data(self) -> str: ...
    @property
    def held_out(self) -> float: ...
    @property
    def seed(self) -> int: ...


def prepare_corpus(
    config: CorpusSettings,
    who: Ranks,
    console: Console,
    *,
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int,
    sequence_length: int,
) -> Corpus:
    """Token shards to train on and to evaluate on; text gets `tokenizer`, or one of `vocab_size` trained on it."""
    from luthier.data.shards import TokenShards
    from luthier.learn.prepare import Corpus, open_corpus

    if any(is_tokenized(spec) for spec in config.data):
        if tokenizer is None or not config.eval_data or not all(is_tokenized(spec) for spec in config.data):
            raise ConfigError(
                "data: token shards need `tokenizer` (the one that made them), `eval_data`, and no text beside them",
                hint="give --tokenizer FOLDER --eval-data SHARDS, and tokenize text corpora first",
            )
        training = [TokenShards.open(Path(spec), tokenizer) for spec in config.data]
        return Corpus(tokenizer, training, TokenShards.open(Path(config.eval_data), tokenizer))
    if config.eval_data:
        raise ConfigError(
            f"eval_data: got {config.eval_data!r}, but text corpora hold a part of themselves out",
            hint="drop eval_data (held_out sets the part), or give token shards as data",
        )
    with who.main_first():
        if who.is_main:
            _write_corpus(config, console, tokenizer, vocab_size=vocab_size, sequence_length=sequence_length)
    corpus = open_corpus(config.out / "data", len(config.data))
    if who.is_main:
        trained, kept = sum(part.num_tokens for part in corpus.training), corpus.held_out.num_tokens
        console.status(f"tokens: {trained:,} to train on, {kept:,} held out, vocabulary {len(corpus.tokenizer):,}")
    return corpus


def _write_corpus(
    config: CorpusSettings,
    console: Console,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    vocab_size: int,
    sequence_length: int,
) -> None:
    from luthier.data.sources import open_source
    from luthier.learn.prepare import prepare_text

    sources = [open_source(spec) for spec in config.data]
    for source in sources:
        console.status(f"corpus: {source.name}, {len(source.documents):,} documents, {source.num_bytes:,} bytes")
        if source.note:
            console.status(f"  {source.note}")
    prepare_text(
        sources,
        tokenizer,
        config.out / "data",
        held_out=config.held_out,
        vocab_size=vocab_size,
        seed=config.seed,
        sequence_length=sequence_length,
    )


def is_tokenized(spec: str) -> bool:
    """Whether a corpus is a folder of token shards."""
    return (Path(spec) / "index.json").is_file()
