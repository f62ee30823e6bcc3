"""`luthier tokens TEXT --model M`: what each token of a text costs, as a heat map that says what it shows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from luthier.cli.texts import first_documents, open_text, opening
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from luthier.data.sources import TextSource
    from luthier.entropy.estimators import TokenDetails
    from luthier.entropy.network import EntropyModel
    from luthier.report.heat_map import HeatMap, HeatToken

Kind = Literal["auto", "surprisal", "allocation", "window", "occlusion"]
LONGEST_CONTEXT = 2048  # tokens, unless asked for more
LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Show what each token of a text costs under a model: a page with a heat map, or rows for programs."""

    data: tyro.conf.Positional[str]
    """Text: a file, a folder, a hub id, python-prose, or token shards."""
    model: str
    """Causal language model (folder or hub id), or the model folder of a train-eem run."""
    estimator: Kind = "auto"
    """What colors a token; auto: surprisal, and allocation where the model has codes. See docs/entropy.md."""
    html: Path = Path("tokens.html")
    """Where the page goes."""
    jsonl: Path | None = None
    """Also write one JSON object for each token here."""
    context: int = 0
    """Tokens that a causal model sees at most; 0: its own limit, up to 2048."""
    max_bytes: int = 16_384
    """Show only the beginning of the text, up to this size."""
    top: int = 5
    """Most probable tokens to tell of each place."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self) -> None:
        if self.context < 0 or self.max_bytes < 1 or self.top < 0:
            raise ConfigError(
                "context and top must not be negative, max_bytes at least 1", hint="leave them at their defaults"
            )


class Measured(NamedTuple):
    """All tokens of the text: what is shown of each."""

    values: NDArray[np.float64]
    """(N,) of the estimator: bits, or relative."""
    details: list[TokenDetails]
    """By window, in order; together N tokens."""
    begins: NDArray[np.bool_]
    """(N,) where a context begins."""
    code_bits: float
    """Bits of the code of each segment; 0 without codes."""


def run(config: TokensConfig, console: Console) -> None:
    """Measure and write the page."""
    from luthier.cli.estimate import is_eem, open_tokenizer
    from luthier.learn.parallel import choose_device
    from luthier.report.heat_map import write_heat_map

    tokenizer = open_tokenizer(config.model)
    text, shortened = _beginning(open_text(config.data, tokenizer), config.max_bytes)
    ids, data = _tokens(tokenizer, text, opened=not is_eem(config.model))
    kind, measured = _measure(config, tokenizer, ids, choose_device(config.device))
    tokens = _rows(tokenizer, data, measured)
    heat = _heat_map(config, kind, measured, tokens, shortened=shortened)
    console.print(f"page: {write_heat_map(heat, config.html)}")
    if config.jsonl is not None:
        _write_rows(config.jsonl, tokens, kind)
        console.print(f"rows: {config.jsonl}")
    console.print(f"{heat.label}: {heat.what}; {heat.is_not}.")
    console.result(_result(config, kind, heat))


def _beginning(source: TextSource, max_bytes: int) -> tuple[str, bool]:
    """The beginning of a corpus's first documents, cut between characters, and whether there is more."""
    documents = first_documents(source, max_bytes).documents
    whole = "".join(documents).encode()
    return whole[:max_bytes].decode("utf-8", "ignore"), len(whole) > max_bytes or len(documents) < len(source.documents)


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str, *, opened: bool) -> tuple[list[int], list[bytes]]:
    """Ids and bytes of the tokens of a text, with the token that opens it for models that have one."""
    from luthier.data.token_bytes import token_bytes
    from luthier.data.tokenizer import encode_texts

    ids = encode_texts(tokenizer, [text])[0]
    data = token_bytes(tokenizer, ids)
    if b"".join(data) != text.encode():
        raise DataError(
            "the tokens' bytes are not those of the text: this tokenizer does not reproduce it",
            hint="use a model with a lossless (byte-level) tokenizer",
        )
    first = opening(tokenizer) if opened else []
    return first + ids, [b""] * len(first) + data


def _measure(
    config: TokensConfig, tokenizer: PreTrainedTokenizerFast, ids: list[int], device: torch.device
) -> tuple[str, Measured]:
    """The estimator that is used, and what it found."""
    import torch

    from luthier.cli.estimate import is_eem
    from luthier.entropy.estimators import ESTIMATORS

    tokens = torch.tensor(ids, device=device)
    if is_eem(config.model):
        from luthier.entropy.network import load_entropy_model

        kind = "allocation" if config.estimator == "auto" else config.estimator
        return kind, _by_segment(load_entropy_model(Path(config.model), device=device), tokens, kind, config.top)
    kind = "surprisal" if config.estimator == "auto" else config.estimator
    if ESTIMATORS[kind].needs_code:
        raise ConfigError(
            f"estimator: {kind} is for models with codes, and {config.model} has none",
            hint="give the model folder of a train-eem run, or --estimator surprisal",
        )
    return kind, _by_window(config, tokenizer, tokens)


def _by_window(config: TokensConfig, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> Measured:
    """A causal model: windows that advance by half, so that all but the first tokens see half a context at least."""
    import torch

    from luthier.cli.estimate import causal_context
    from luthier.entropy.estimators import describe
    from luthier.models.load import load_pretrained

    model = load_pretrained(config.model, dtype=torch.float32, device=ids.device)
    context = causal_context(config.context, config.model, model)
    stride, first = max(1, context // 2), len(opening(tokenizer))
    inputs = torch.cat((torch.tensor([tokenizer.eos_token_id], device=ids.device), ids[:-1]))
    details = []
    for start in range(0, max(1, len(ids) - context + stride), stride):
        seen = context - stride if start else 0
        window = slice(start, min(start + context, len(ids)))
        with torch.no_grad():
            logits = model(input_ids=inputs[None, window], use_cache=False).logits[0, seen:]
        details.append(describe(logits, ids[window][seen:], top=config.top))
    nats = torch.cat([part.nats for part in details]).double().cpu().numpy()
    nats[:first] = 0  # what always opens a text tells nothing and costs nothing
    begins = torch.arange(len(ids)).numpy() == 0
    return Measured(nats / LN2, details, begins, 0.0)


def _by_segment(model: EntropyModel, ids: torch.Tensor, kind: str, top: int) -> Measured:
    """A model with codes: segments of its window, each with a fresh context."""
    import torch

    from luthier.entropy.estimators import ESTIMATORS, describe

    values, details = [], []
    for segment in ids.split(model.eem.window):
        row = segment[None]
        values.append(ESTIMATORS[kind].estimate(model, row)[0])
        with torch.no_grad():
            code = model.encode(row) if ESTIMATORS[kind].needs_code else None
            details.append(describe(model.logits(row, code)[0], segment, top=top))
    found = torch.cat(values).double().cpu().numpy()
    scaled = found / LN2 if ESTIMATORS[kind].is_nats else found / max(float(found.max()), 1e-12)
    begins = torch.arange(len(ids)).numpy() % model.eem.window == 0
    return Measured(scaled, details, begins, model.code_bits if ESTIMATORS[kind].needs_code else 0.0)


def _rows(tokenizer: PreTrainedTokenizerFast, data: list[bytes], measured: Measured) -> list[HeatToken]:
    from luthier.data.token_bytes import token_bytes
    from luthier.report.heat_map import HeatToken

    found = list[HeatToken]()
    for part in measured.details:
        flat = token_bytes(tokenizer, part.top.flatten().tolist())
        count = part.top.shape[1]
        for place, (nats, entropy, rank, chances) in enumerate(
            zip(part.nats.tolist(), part.entropy.tolist(), part.rank.tolist(), part.top_p.tolist(), strict=True)
        ):
            number = len(found)
            found.append(
                HeatToken(
                    data=data[number],
                    bits=float(measured.values[number]),
                    surprisal=nats / LN2,
                    entropy=entropy / LN2,
                    rank=rank,
                    top=list(zip(flat[place * count : (place + 1) * count], chances, strict=True)),
                    begins=bool(measured.begins[number]),
                )
            )
    return found


def _heat_map(
    config: TokensConfig, kind: str, measured: Measured, tokens: list[HeatToken], *, shortened: bool
) -> HeatMap:
    from luthier.entropy.estimators import ESTIMATORS
    from luthier.report.heat_map import HeatMap

    label, is_nats = ESTIMATORS[kind].label, ESTIMATORS[kind].is_nats
    title = Path(config.data).name + (f", first {sum(len(t.data) for t in tokens):,} bytes" if shortened else "")
    return HeatMap(
        title=title,
        model=Path(config.model).name,
        tokens=tokens,
        label=label.name,
        what=label.what,
        is_not=label.is_not,
        facts=_facts(kind, measured),
        notes=notes(kind, measured.code_bits),
        unit="bits" if is_nats else "of the largest",
        top=16.0 if is_nats else 1.0,
        curve=is_nats,
    )


def _facts(kind: str, measured: Measured) -> list[tuple[str, str]]:
    if not measured.code_bits:
        return []
    facts = [("code of a segment, bits", f"{measured.code_bits:g}")]
    if kind == "window":
        facts.append(("estimates below zero", f"{int((measured.values < 0).sum()):,}"))
        facts.append(("left out of each segment, bits", f"{measured.code_bits:g}"))
    return facts


def notes(kind: str, code_bits: float) -> list[str]:
    """What the page must say besides the label: about bounds, the predictive entropy, and codes."""
    from luthier.entropy.estimators import PREDICTIVE_ENTROPY, UPPER_BOUND

    words = PREDICTIVE_ENTROPY
    found = [
        "The scale ends at 16 bits for every text and model, so that pages can be compared; what costs more has the "
        "last color. The numbers of single tokens bound nothing.",
        f"{words.name.capitalize()}: {words.what}; {words.is_not}.",
    ]
    if kind in ("surprisal", "allocation"):
        found.append(f"The sum over all tokens: {UPPER_BOUND[0].lower()}{UPPER_BOUND[1:]}")
        found.append("The end of the text is not charged here; `luthier estimate` charges it.")
    if kind == "window":
        found.append(
            f"The code of each segment, {code_bits:g} bits, cancels in the differences: the sum is below the code "
            "length by that much for each segment, and so is the curve."
        )
    if kind == "occlusion":
        found[0] = "The scale is relative to the largest value in this text: pages cannot be compared."
    return found


def _write_rows(path: Path, tokens: list[HeatToken], kind: str) -> None:
    from luthier.core.files import atomic_write

    rows = [
        {
            "text": token.data.decode("utf-8", "backslashreplace"),
            "bytes": token.data.hex(),
            kind: token.bits,
            "surprisal_bits": token.surprisal,
            "predictive_entropy_bits": token.entropy,
            "rank": token.rank,
            "top": [[data.decode("utf-8", "backslashreplace"), p] for data, p in token.top],
        }
        for token in tokens
    ]
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _result(config: TokensConfig, kind: str, heat: HeatMap) -> dict[str, Any]:
    size, total = sum(len(token.data) for token in heat.tokens), sum(token.bits for token in heat.tokens)
    return {
        "estimator": kind,
        "label": heat.label,
        "what": heat.what,
        "is_not": heat.is_not,
        "tokens": len(heat.tokens),
        "bytes": size,
        "total": total,
        "bits_per_byte": total / size if heat.curve else None,
        "html": str(config.html),
    }
