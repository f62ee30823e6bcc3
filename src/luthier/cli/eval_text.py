"""`luthier eval` on text: perplexity and bits per byte of any causal language model, beside general compressors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.texts import first_documents, open_text, opening
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.cli.eval import EvalConfig
    from luthier.data.sources import TextSource
    from luthier.learn.parallel import Ranks

LONGEST_CONTEXT = 2048  # tokens, unless asked for more


def run(config: EvalConfig, console: Console) -> None:
    """Score the text, print the table, and write it to the run folder if one is asked for. Ranks share the work."""
    from luthier.data.tokenizer import is_lossless, load_tokenizer
    from luthier.learn.parallel import ranks
    from luthier.models.load import load_pretrained

    with ranks(config.device) as who, _open_run(config, is_main=who.is_main) as folder:
        tokenizer = load_tokenizer(config.model)
        source = first_documents(open_text(config.data, tokenizer), config.max_bytes)
        given = open_text(config.given, tokenizer) if config.given else None
        model = load_pretrained(config.model, device=who.device)
        score = _score(model, tokenizer, source, config, who)
        if not who.is_main:
            return
        rows = [_model_row(config.model, score, conditional=given is not None)]
        if config.compressors:
            rows += _compressor_rows(source, given)
        table: dict[str, Any] = {
            "title": f"{source.name}: {source.num_bytes:,} bytes in {len(source.documents):,} documents",
            "columns": ["", "bits/byte", "95 % interval", "given the training text"],
            "rows": rows,
            "note": _note(score, source, model, lossless=is_lossless(tokenizer, source.documents), given=given),
        }
        console.table(**table)
        console.result({**score, "perplexity": math.exp(score["loss"]), "table": rows})
        if folder is not None:
            folder.write_summary(_summary(score, table))


@contextlib.contextmanager
def _open_run(config: EvalConfig, *, is_main: bool) -> Iterator[RunFolder | None]:
    """The run folder, where one is asked for, on the main rank."""
    if config.out is None or not is_main:
        yield None
        return
    opened = RunFolder.open(config.out, to_mapping(config), may_change=("out", "device"))
    with contextlib.closing(opened) as folder:
        yield folder


def _summary(score: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    from luthier.learn.evaluate import interval_text

    headline = {
        "bits per byte": f"{score['bits_per_byte']:.3f} {interval_text(score)}",
        "perplexity": f"{math.exp(score['loss']):.2f} per token",
    }
    return {"verb": "eval", "headline": headline, "tables": [table], "score": score}


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    config: EvalConfig,
    who: Ranks,
) -> dict[str, Any]:
    import numpy as np

    from luthier.data.files import cut_paragraphs
    from luthier.data.tokenizer import encode_texts
    from luthier.learn.evaluate import TokenStream, code_length, stream_nll
    from luthier.learn.objectives import CausalLoss, has_plain_head

    # The interval is over pieces of about 8 kB, so that one long document has one too.
    documents = [cut_paragraphs(document) for document in source.documents]
    pieces = [piece for document in documents for piece in document]
    encoded = encode_texts(tokenizer, pieces)
    last = 0
    for document in documents:
        first, last = last, last + len(document)
        encoded[first][:0] = opening(tokenizer)
        encoded[last - 1].append(tokenizer.eos_token_id)
    stream = TokenStream(
        tokens=np.concatenate([np.asarray(ids, np.int64) for ids in encoded]),
        starts=np.cumsum([0, *(len(ids) for ids in encoded[:-1])]),
        num_bytes=np.asarray([len(piece.encode()) for piece in pieces]),
    )
    limit = getattr(model.config, "max_position_embeddings", LONGEST_CONTEXT)
    if config.context > limit:
        raise ConfigError(
            f"context: got {config.context}, but {config.model} reads at most {limit} tokens",
            hint=f"give --context {limit} or less",
        )
    context = config.context or min(limit, LONGEST_CONTEXT)
    nats = stream_nll(
        CausalLoss(model, plain_head=has_plain_head(model)),
        stream.tokens,
        start_token=tokenizer.eos_token_id,
        context=context,
        stride=max(1, context // 2),
        batch_size=config.batch_size,
        who=who,
    )
    for bos in opening(tokenizer):
        nats[stream.tokens == bos] = 0  # it is always there, so it tells nothing and costs nothing
    return {**code_length(stream, nats), "context": context}


def _model_row(name: str, score: dict[str, Any], *, conditional: bool) -> list[str]:
    from luthier.learn.evaluate import interval_text

    value = f"{score['bits_per_byte']:.3f}"
    return [
        Path(name).name,
        "—" if conditional else value,
        interval_text(score),
        value if conditional else "—",
    ]


def _compressor_rows(source: TextSource, given: TextSource | None) -> list[list[str]]:
    from luthier.data.compressors import COMPRESSORS, compressed_bytes

    text = "".join(source.documents).encode()
    known = "".join(given.documents).encode() if given else b""
    rows = []
    for name in COMPRESSORS:
        cold = 8 * compressed_bytes(name, text) / source.num_bytes
        warm = f"{8 * compressed_bytes(name, text, given=known) / source.num_bytes:.3f}" if given else "—"
        rows.append([name, f"{cold:.3f}", "—", warm])
    return rows


def _note(
    score: dict[str, Any], source: TextSource, model: PreTrainedModel, *, lossless: bool, given: TextSource | None
) -> str:
    parts = [
        f"perplexity {math.exp(score['loss']):.2f} per token, {score['scored_tokens']:,} tokens, "
        f"contexts of {score['context']} tokens that advance by half; the interval is a bootstrap over "
        f"{score['documents']} pieces of at most about 8 kB."
    ]
    if given is not None:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        parts.append(
            f"The model has read the training text ({given.num_bytes:,} bytes), so its place is the last column; its "
            f"own {size:,} bytes are not counted, and neither is that text for the compressors."
        )
    if not lossless:
        parts.append("The tokenizer does not reproduce this text exactly, so bits per byte are a lower bound here.")
    return " ".join(parts)
