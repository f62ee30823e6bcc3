"""`luthier long-data`: long documents to learn from and to test on: facts to find, or questions that an LLM writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.files import atomic_folder, write_jsonl
from luthier.core.run import RunFolder
from luthier.data.long_documents import Form, Needles, Size, sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.train.long_qa import LongRows

MAY_CHANGE = ("out", "endpoint", "device", "at_once")
OWN_TOKENIZER = "own"
SAMPLE = 2000  # rows on which a tokenizer of one's own is trained
CHARACTERS = 4  # of a token, for the lengths of these rows


@dataclass(frozen=True, kw_only=True)
class LongDataConfig:
    """Make long rows of kind messages, whose replies are learned.

    needles: train.jsonl, documents with facts at uniform depth and questions about them, among strings to copy; and
    test.jsonl (kind answer), whose metadata has length and depth, for `luthier eval --tasks needle:FILE`.
    qa-long, qa-short: train.jsonl, documents and a question that a language model writes about a part of them.
    """

    out: Path = Path("runs/long-data")
    """Folder for the files."""
    kind: Literal["needles", "qa-long", "qa-short"] = "needles"
    """qa-long: a question on a random part of each long document; qa-short: documents joined, a question on one."""
    tokenizer: str = ""
    """Lengths are in tokens of this folder or hub id; own: one that is made for such rows; empty: in characters."""
    data: tuple[str, ...] = ()
    """Corpora: the filler of needle documents (empty: generated sentences), or the documents to ask about."""
    length: int = 256
    """Of a training row with its replies; of qa-long, where documents are cut; of qa-short, what they reach together.
    What a model trains on at once (sequence_length) must hold a row: a longer one loses its end."""
    rows: int = 20_000
    """Training rows of needles."""
    copy_share: float = 0.4
    """Share of the training rows in which a string is to be copied, as practice in looking back."""
    copy_words: int = 20
    """Most names and values in such a string, which is said over and over until the row is full."""
    form: Form = "sentences"
    """sentences: 'The code of Kelu is 47.'; pairs: 'Kelu47.', for rows of a few dozen tokens."""
    facts: int = 4
    """Facts in a document."""
    questions: int = 4
    """Questions of a training row, each about any of its facts."""
    names: int = 100
    """Different names that facts are about."""
    digits: int = 2
    """Digits of a fact's value."""
    test: int = 40
    """Test rows of each length and depth."""
    test_lengths: tuple[int, ...] = (256, 512, 1024)
    """Lengths of the test rows."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the fact that is asked for stands in a test row: 0 at the beginning, 1 just before the question."""
    model: str = ""
    """Model that writes questions: a folder, or a name behind `endpoint`."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server that has the model; by default it runs in this process."""
    shortest: int = 8192
    """qa-long: documents below this length are left out."""
    part: tuple[int, int] = (2000, 8000)
    """qa-long: shortest and longest part that a question is about."""
    per_document: int = 1
    """qa-long: questions on each document, each a row of its own."""
    attempts: int = 3
    """Times that a question is asked for until the reply can be read."""
    at_once: int = 16
    """Calls in flight."""
    device: str = "auto"
    """cpu, cuda or auto, for a model in this process."""
    seed: int = 0
    """Another seed gives other rows."""

    def __post_init__(self) -> None:
        if self.kind != "needles" and not (self.model and self.data):
            raise ConfigError(
                f"{self.kind}: needs documents and a model that writes questions about them",
                hint="give --data CORPUS --model NAME --endpoint URL",
            )
        if min(self.length, self.at_once, *self.test_lengths) < 1 or min(self.rows, self.test) < 0:
            raise ConfigError("lengths and at_once must be positive, rows and test not negative", hint="raise them")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths: got {self.depths}, expected 0 to 1", hint="0 0.5 1")


def run(config: LongDataConfig, console: Console) -> None:
    """Write the files; a second run asks the model only for what is missing."""
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        written = (_write_needles if config.kind == "needles" else _write_questions)(config, folder.path, console)
        table: dict[str, Any] = {
            "title": f"{config.out}: {config.kind}, lengths in {'tokens' if config.tokenizer else 'characters'}",
            "columns": ["file", "rows", "sha256"],
            "rows": [[name, f"{count:,}", digest[:16]] for name, (count, digest) in written.items()],
            "note": "",
        }
        console.table(**table)
        headline = {name: f"{count:,} rows" for name, (count, _) in written.items()}
        folder.write_summary({"verb": "long-data", "headline": headline, "tables": [table]})
        console.result({name: {"rows": count, "sha256": digest} for name, (count, digest) in written.items()})


def _write_needles(config: LongDataConfig, folder: Path, console: Console) -> dict[str, tuple[int, str]]:
    filler = [part for document in _documents(config) for part in sentences(document) if part.strip()]
    size = _own_size(config, filler, folder) if config.tokenizer == OWN_TOKENIZER else _size(config.tokenizer)
    needles = _needles(config, filler, size)
    written = {}
    with console.progress(config.rows, "training rows") as advance:

        def training() -> Iterator[dict[str, Any]]:
            for number in range(config.rows):
                yield needles.training_row(number, config.length)
                advance(1)

        if config.rows:
            written["train.jsonl"] = write_jsonl(folder / "train.jsonl", training())
    if config.test:
        tests = (
            needles.test_row(number, length, depth)
            for length in config.test_lengths
            for depth in config.depths
            for number in range(config.test)
        )
        written["test.jsonl"] = write_jsonl(folder / "test.jsonl", tests)
    return written


def _needles(config: LongDataConfig, filler: Sequence[str], size: Size) -> Needles:
    return Needles(
        size=size,
        form=config.form,
        facts=config.facts,
        questions=config.questions,
        names=config.names,
        digits=config.digits,
        copy_share=config.copy_share,
        copy_words=config.copy_words,
        filler=filler,
        seed=config.seed,
    )


def _documents(config: LongDataConfig) -> list[str]:
    from luthier.data.sources import open_source

    sources = [open_source(spec) for spec in config.data]
    if chats := [source.name for source in sources if source.conversations]:
        raise DataError(f"{chats[0]}: conversations, expected text", hint="give documents")
    return [document for source in sources for document in source.documents]


def _size(tokenizer: str) -> Size:
    """Length in tokens of a tokenizer, or in characters without one."""
    if not tokenizer:
        return len
    from luthier.data.tokenizer import load_tokenizer

    return _token_count(load_tokenizer(tokenizer))


def _token_count(tokenizer: PreTrainedTokenizerFast) -> Size:
    from luthier.data.tokenizer import encode_texts

    known: dict[str, int] = {}  # filler comes again and again; whole documents do not

    def size(text: str) -> int:
        if text not in known:
            count = len(encode_texts(tokenizer, [text])[0])
            if len(text) > 1000:
                return count
            known[text] = count
        return known[text]

    return size


def _own_size(config: LongDataConfig, filler: Sequence[str], folder: Path) -> Size:
    """The length in tokens of a tokenizer that is trained on such rows, and written beside them."""
    from luthier.data.template import render
    from luthier.data.tokenizer import load_tokenizer, train_bpe

    if not (folder / "tokenizer").exists():
        needles = _needles(config, filler, len)
        rows = (needles.training_row(number, CHARACTERS * config.length) for number in range(SAMPLE))
        tokenizer = train_bpe((render(row["messages"]) for row in rows), None)
        with atomic_folder(folder / "tokenizer") as partial:
            tokenizer.save_pretrained(partial)
    return _token_count(load_tokenizer(folder / "tokenizer"))


def _write_questions(config: LongDataConfig, folder: Path, console: Console) -> dict[str, tuple[int, str]]:
    if config.tokenizer == OWN_TOKENIZER:
        raise ConfigError(f"tokenizer: own is for needles, got {config.kind}", hint="give the model's own tokenizer")
    found = asyncio.run(_ask(config, folder, console))
    for reason, count in found.left_out.items():
        if count:
            console.status(f"{count} left out: {reason}")
    if not found.rows:
        raise DataError("no row could be made", hint="give longer documents, or lower shortest, part and length")
    return {"train.jsonl": write_jsonl(folder / "train.jsonl", found.rows)}


async def _ask(config: LongDataConfig, folder: Path, console: Console) -> LongRows:
    from luthier.cli.models import open_model
    from luthier.llm.cache import CachedBackend
    from luthier.train.long_qa import LongQuestions, long_document_rows, short_document_rows

    documents = _documents(config)
    settings = LongQuestions(
        size=_size(config.tokenizer),
        length=config.length,
        shortest=config.shortest,
        part=config.part,
        per_document=config.per_document,
        attempts=config.attempts,
        at_once=config.at_once,
        seed=config.seed,
    )
    inner = open_model(config.model, endpoint=config.endpoint, device=config.device, concurrency=config.at_once)
    backend = CachedBackend(inner, folder / "replies.sqlite")
    make = long_document_rows if config.kind == "qa-long" else short_document_rows
    try:
        with console.progress(len(documents) * config.per_document, "questions") as advance:
            return await make(documents, backend, settings, lambda: advance(1))
    finally:
        await backend.aclose()
