"""Token windows that the layers are quantized on: from any text, from conversations, or from the model's own writing.

Documents are shuffled, joined and cut into windows of equal length, without padding or a mask between documents. The
validation windows come from documents that no other window has a part of.

Departures from the published code: documents longer than a window are kept, and cut, in place of being dropped; a
document ends with the end-of-text token and begins with the tokenizer's opening token if it has one of its own; text
that looks like a special token is ordinary text, except in conversations, which go through the model's chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.core.files import atomic_write
from luthier.core.seeds import derive_seed
from luthier.data.chat import CHAT_TEMPLATE, encode_chat
from luthier.data.files import PIECE_BYTES, cut_paragraphs
from luthier.data.formats import READERS, detect_kind, read_rows
from luthier.data.row_source import conversation
from luthier.data.shards import TokenShards
from luthier.data.sources import TextSource, open_source
from luthier.data.tokenizer import decode_text, encode_documents, num_ids
from luthier.llm.generation import Row, Vocabulary, generate
from luthier.quantize.config import QuantizeConfig

SELF = "self"  # in place of a corpus: what the model itself writes
MIN_DOCUMENTS = 20  # a corpus of fewer is cut at paragraphs, so that windows can come from all over it
MIN_PIECE_BYTES = 256
ENCODED_AT_ONCE = 64
PATIENCE = 20  # times the rows expected, before a model that writes next to nothing is given up


class Windows(NamedTuple):
    """Token ids, int64: what the layers are trained on (n, tokens), and what chooses the best epoch (m, tokens)."""

    training: Tensor
    validation: Tensor


@dataclass(frozen=True)
class CalibrationText:
    """Documents, and how some of them become token ids; `name` and `note` are for the user."""

    name: str
    documents: Sequence[Any]
    encode: Callable[[Sequence[Any]], list[list[int]]]
    note: str = ""


def calibration(
    spec: str,
    tokenizer: PreTrainedTokenizerFast,
    config: QuantizeConfig,
    load_model: Callable[[], PreTrainedModel] | None = None,
) -> Windows:
    """The windows that the settings ask for, from what `open_calibration` reads; `self` needs a way to load the model.

    Raises: DataError as `open_calibration`, `self_generated` and `windows`.
    """
    if spec == SELF and load_model is not None:
        needed = (config.samples + config.validation_samples) * config.sequence_length
        length, model = config.sequence_length, load_model()
        text = self_generated(model, tokenizer, tokens=needed, length=length, seed=config.seed)
    else:
        text = open_calibration(spec, tokenizer)
    return windows(
        text,
        samples=config.samples,
        validation_samples=config.validation_samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )


def from_source(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> CalibrationText:
    """A corpus of plain text; a corpus of few documents is cut into pieces of at most about 8 kB."""
    documents: Sequence[str] = source.documents
    if len(documents) < MIN_DOCUMENTS:
        size = min(PIECE_BYTES, max(MIN_PIECE_BYTES, source.num_bytes // (4 * MIN_DOCUMENTS)))
        documents = [piece for document in documents for piece in cut_paragraphs(document, size)]
    opening = _opening(tokenizer)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [opening + ids for ids in encode_documents(tokenizer, texts)]

    return CalibrationText(source.name, documents, encode, source.note)


def from_conversations(
    name: str, conversations: Sequence[Sequence[dict[str, str]]], tokenizer: PreTrainedTokenizerFast
) -> CalibrationText:
    """Conversations (lists of {role, content}) in the model's chat template; DataError when it has none."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{name}: conversations, but the model's tokenizer has no chat template",
            hint="give plain text, or add chat_template.jinja to the model folder",
        )

    def encode(some: Sequence[Any]) -> list[list[int]]:
        if tokenizer.chat_template == CHAT_TEMPLATE:
            return [encode_chat(tokenizer, messages).ids for messages in some]
        return [_apply_template(tokenizer, messages, name) for messages in some]

    return CalibrationText(name, conversations, encode)


def open_calibration(spec: str, tokenizer: PreTrainedTokenizerFast) -> CalibrationText:
    """Text as `data.sources.open_source` reads it, or token shards that were made with this tokenizer; rows of a .jsonl
    or .parquet file may also be `messages`, or `prompt` and `completion`. DataError for what cannot be read."""
    path = Path(spec).expanduser()
    if (path / "index.json").is_file():
        shards = TokenShards.open(path, tokenizer)
        return from_source(TextSource(shards.name, list(shards.decode_documents(tokenizer))), tokenizer)
    if path.suffix not in READERS or not path.is_file():
        return from_source(open_source(spec), tokenizer)
    first = next(read_rows(path))
    kind = detect_kind(first, f"{path} row 1")
    if kind == "text":
        return from_source(open_source(spec), tokenizer)
    if kind not in ("messages", "completion"):
        raise DataError(
            f"{path}: {kind} rows, expected text, messages, or prompt and completion",
            hint="rename the columns that hold the text to calibrate on",
        )
    rows = list(read_rows(path, kind))
    if kind == "messages":
        return from_conversations(spec, [row["messages"] for row in rows], tokenizer)
    if any(not isinstance(row["prompt"], str) or not isinstance(row["completion"], str) for row in rows):
        return from_conversations(spec, [conversation(row) for row in rows], tokenizer)
    return from_source(TextSource(spec, tuple(row["prompt"] + row["completion"] for row in rows)), tokenizer)


def windows(
    text: CalibrationText, *, samples: int, validation_samples: int, sequence_length: int, seed: int
) -> Windows:
    """`samples` windows to train on and `validation_samples` others, from different documents.

    Which documents the validation has depends neither on `samples` nor on their order in the corpus, but for the seed.
    Raises: DataError with the tokens got and expected when the text is too short for both.
    """
    distinct = sorted({repr(document): document for document in text.documents}.items())
    draw = np.random.default_rng(derive_seed(seed, "calibration"))
    stream = _encoded(text, [distinct[i][1] for i in draw.permutation(len(distinct))])
    validation = _take(stream, validation_samples * sequence_length)
    training = _take(stream, samples * sequence_length)
    got, expected = len(validation) + len(training), (samples + validation_samples) * sequence_length
    if got < expected:
        raise DataError(
            f"{text.name}: {got:,} tokens, but {expected:,} are needed for {samples} + {validation_samples} windows of "
            f"{sequence_length} tokens",
            hint="give more text with --data, or lower --samples, --validation-samples or --sequence-length",
        )
    shape = (-1, sequence_length)
    return Windows(torch.tensor(training).view(shape), torch.tensor(validation).view(shape))


def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokens: int,
    length: int,
    seed: int,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda tokens: None,
) -> CalibrationText:
    """Texts that the model itself writes at temperature 1, `tokens` tokens or more in all, each of at most `length`.

    A text begins with the opening token, if there is one, and a random token of the vocabulary, as in LLM-QAT
    (arXiv 2305.17888): texts would be too alike without. `advance` hears how many tokens have been written.
    Raises: DataError when the model ends its texts so soon that there will never be enough.
    """
    special, opening = set(tokenizer.all_special_ids), _opening(tokenizer)
    rows_of_embedding = next(model.get_input_embeddings().parameters()).shape[0]
    size = min(num_ids(tokenizer), rows_of_embedding)
    starts = [token for token in range(size) if token not in special]
    vocabulary = Vocabulary(
        size=size, end_ids=frozenset(_end_ids(model, tokenizer)), decode=lambda ids: decode_text(tokenizer, ids)
    )
    draw = np.random.default_rng(derive_seed(seed, "first tokens"))
    documents, written, limit = list[tuple[int, ...]](), 0, PATIENCE * (tokens // length + batch_size)
    while written < tokens and len(documents) < limit:
        first = [[*opening, starts[i]] for i in draw.integers(len(starts), size=batch_size)]
        rows = [
            Row(
                prompt=prompt,
                max_tokens=max(1, length - len(prompt)),
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                stop=(),
                seed=derive_seed(seed, "self-generated", len(documents) + number),
                top_logprobs=None,
            )
            for number, prompt in enumerate(first)
        ]
        generate(model, rows, vocabulary)
        done = [(*row.prompt, *row.ids, *_end(row, tokenizer)) for row in rows]
        documents += done
        written += sum(map(len, done))
        advance(sum(map(len, done)))
    if written < tokens:
        raise DataError(
            f"the model wrote {written:,} tokens in {len(documents):,} texts, but {tokens:,} are needed",
            hint="it ends its texts at once: give it text to calibrate on with --data",
        )
    return CalibrationText("self", documents, lambda some: [list(ids) for ids in some])


def kept_windows(path: Path, make: Callable[[], Windows]) -> Windows:
    """The windows in a file, or those that `make` gives, which then go to the file: resuming needs the very same."""
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                return Windows(file.get_tensor("training"), file.get_tensor("validation"))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: damaged ({error})", hint="remove the run folder and begin anew") from error
    made = make()
    atomic_write(path, save(made._asdict()))
    return made


def _encoded(text: CalibrationText, documents: Sequence[Any]) -> Iterator[list[int]]:
    """Ids of one document after another, encoded a few at a time: most of a large corpus is never needed."""
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        yield from text.encode(documents[start : start + ENCODED_AT_ONCE])


def _take(stream: Iterator[list[int]], count: int) -> list[int]:
    """`count` tokens of whole documents and the beginning of a last one; fewer only where the stream ends."""
    taken = list[int]()
    while len(taken) < count and (document := next(iter(islice(stream, 1)), None)) is not None:
        taken += document
    return taken[:count]


def _opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The token that opens a document, for models that have one of its own."""
    bos = tokenizer.bos_token_id
    return [] if bos is None or bos == tokenizer.eos_token_id else [bos]


def _end(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return (tokenizer.eos_token_id,) if row.finish_reason == "stop" else ()


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _apply_template(tokenizer: PreTrainedTokenizerFast, messages: Any, name: str) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise DataError(
            f"{name}: the model's chat template refuses a conversation ({error})",
            hint="some templates take no system message, or only alternating roles: remove such rows",
        ) from error
    return list(ids)
