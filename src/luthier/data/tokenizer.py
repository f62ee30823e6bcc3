"""Tokenizers: train one, load one, and turn documents into token ids without losing or inventing anything.

Every tokenizer here is a Hugging Face `PreTrainedTokenizerFast`. A document is data: text in it that looks like a
special token (`<|endoftext|>`) is encoded as the ordinary characters it consists of, never as the token.

The tokenizers library encodes batches on several threads. A program that forks after that (a data loader with worker
processes) is told so on standard error; setting TOKENIZERS_PARALLELISM=false beforehand avoids both.

Departures from Instella's own tokenizer: no NFC normalizer, so that encoding is lossless; digits are single tokens,
which makes arithmetic learnable for small models; the vocabulary is trained on the user's text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import DataError, require
from luthier.core.files import sha256_bytes
from luthier.data.files import END_OF_TEXT, missing_path
from luthier.data.template import CHAT_TEMPLATE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PADDING = "<|padding|>"
NUM_BYTES = 256  # the alphabet, so that every string can be encoded
MOST_IDS = 1 << 16

# What merges may not cross: English contractions; a word with the one character before it; a single digit; punctuation
# with a space before and newlines after; blank lines; runs of spaces without the one that belongs to the next word.
SPLIT_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# For calculations, so that a small model learns them soon: an operation (x*4, 17+5), a result (=x, =22) and a question
# (x?) are tokens of their own. To know 17+5 is then to know a token, and to find what is done with x to find one.
SYMBOL_PATTERN = (
    r"\p{N}{1,2}[-+*]\p{N}{1,2}"
    r"|=\p{Ll}|=\p{N}{1,2}|\p{Ll}\?|\p{Lu}: "
    r"|[-+*]\p{N}{1,2}|\p{N}{1,2}|\p{L}{2,}|\p{L}"
    r"|[^\s\p{L}\p{N}]+|\s"
)

# One string per habit by which tokenizers lose text.
LOSSLESS_PROBES = (
    "two  spaces, \ttabs\t and\r\nboth line ends\n\n",
    " leading and trailing ",
    "decomposed e\u0301 and composed \u00e9, ligature \ufb01, full-width \uff21",
    f"{END_OF_TEXT}{PADDING}<s></s><unk>[UNK]",
    "CAPITALS don't n't , . ! ' s",
    "\x00\x1f\x7f\u00a0\u2028\ufeff\ufffd \U0001f469\u200d\U0001f680 \u4e2d\u6587 \U00010348",
)


def train_bpe(
    documents: Iterable[str],
    vocab_size: int | None,
    *,
    pattern: str = SPLIT_PATTERN,
    end_of_text: str = END_OF_TEXT,
    padding: str = PADDING,
) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer; the same documents always give the same one.

    vocab_size: number of token ids, of which 0 is `end_of_text` (BOS and EOS), 1 is `padding` and 256 are the bytes;
    None: as many as the text supports. pattern: what merges may not cross, each match a piece of its own.
    There is no normalizer and no added leading space, and the Instella chat template is set.

    Raises: DataError when vocab_size is below 258, or above what the text supports.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = NUM_BYTES + 2
    if vocab_size is not None and vocab_size < smallest:
        raise DataError(
            f"vocabulary of {vocab_size}: a lossless one needs at least {smallest} (256 bytes and 2 special tokens)",
            hint="512 suits a few kilobytes of text, 4096 a few megabytes",
        )
    backend = Tokenizer(models.BPE())
    # Offsets keep their spaces: the loss mask of the chat template is found by offset.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_IDS if vocab_size is None else vocab_size,
        special_tokens=[end_of_text, padding],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if vocab_size is not None and (reached := backend.get_vocab_size()) < vocab_size:
        raise DataError(
            f"the text supports a vocabulary of {reached} tokens, not {vocab_size}: nothing is left to merge",
            hint=f"set vocab_size to at most {reached}, or give more text",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=padding,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, whose id is the byte; 256 is `<|endoftext|>` (BOS and EOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path_or_id: str | Path, *, needs_padding: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the hub; remote code is never run.

    needs_padding: also require a padding token that is not EOS. With pad = eos, masking the padding masks the EOS that
    a model must learn, and it never stops.

    Raises: DataError for a missing path, a folder without a fast tokenizer, no EOS, or an unusable padding token.
    """
    transformers = require("transformers", "torch")
    path = Path(path_or_id).expanduser()
    looks_local = path.is_absolute() or str(path_or_id).startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and (looks_local or (len(path.parts) > 1 and path.parent.exists())):
        raise missing_path(path)
    if (path / "model" / "config.json").is_file() and not (path / "tokenizer.json").exists():
        raise DataError(f"{path}: a run folder, expected a model folder", hint=f"give {path / 'model'}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path if path.exists() else path_or_id))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path_or_id}: no tokenizer could be loaded ({reason})",
            hint="give a model folder that holds tokenizer.json, or a hub id",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{path_or_id}: not a fast tokenizer", hint="convert it, so that it has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path_or_id}: no end-of-text token", hint="set eos_token in tokenizer_config.json")
    if needs_padding:
        check_padding(tokenizer, str(path_or_id))
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: the highest id and one, which is more than len(tokenizer) where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_padding(tokenizer: PreTrainedTokenizerFast, name: str = "tokenizer") -> None:
    """Raise DataError unless there is a padding token of its own."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        got = "there is no padding token" if tokenizer.pad_token_id is None else "the padding token is EOS"
        raise DataError(
            f"{name}: {got}, so padding cannot be told from the end of a text",
            hint="set pad_token in tokenizer_config.json to an unused token of the vocabulary",
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides which ids a text gets: equal digests, equal ids.

    Padding, truncation, the post-processor and the chat template are left out, because encoding here does not use them.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("padding", "truncation", "post_processor"):
        content.pop(key, None)
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, all of it ordinary text: no special token is added or recognized, nothing is truncated.

    Raises: DataError when the tokenizer makes EOS out of ordinary text regardless.
    """
    with _plainly(tokenizer) as backend:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    for text, ids in zip(texts, encoded, strict=True):
        if tokenizer.eos_token_id in ids:
            raise DataError(
                f"the tokenizer reads end-of-text into the ordinary text {text[:40]!r}...",
                hint="use a byte-level tokenizer, in which special tokens cannot be spelled",
            )
    return encoded


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, followed by EOS. Raises: DataError as `encode_texts`, or without an EOS token."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-text token", hint="set eos_token in tokenizer_config.json")
    encoded = encode_texts(tokenizer, documents)
    for ids in encoded:
        ids.append(eos)
    return encoded


def decode_text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of some ids, special tokens included, without any clean-up: the inverse of `encode_texts`."""
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)


def is_lossless(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str] = LOSSLESS_PROBES) -> bool:
    """Whether texts survive encoding and decoding; the default ones try each usual way in which text gets lost."""
    return all(
        decode_text(tokenizer, ids) == text for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True)
    )


@contextlib.contextmanager
def _plainly(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokenizer]:
    """The tokenizer's backend, for a moment without special tokens, and without what earlier calls left switched on."""
    backend = tokenizer.backend_tokenizer
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = special
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
