"""What `luthier estimate` says: the ways to code a text, the compressors beside them, and what the number means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from luthier.data.sources import TextSource
    from luthier.entropy.code_length import CodeLength

Sizes = Mapping[str, tuple[float, float | None] | str]
"""Bits per byte of each compressor, cold and (if there is a given text) conditional; or why it cannot run."""


class Found(NamedTuple):
    """A text measured: ways to code it, the first of which is the answer."""

    ways: dict[str, CodeLength]
    model_bytes: int
    """Of the weights, which count until they are paid for; 0 where none are sent."""
    how: str
    """How the text was read."""


def break_even(model_bytes: int, ours: float, theirs: float) -> float:
    """Bytes of such text from which on model and code together are smaller; infinite if never. Rates in bits/byte."""
    return 8 * model_bytes / (theirs - ours) if theirs > ours else math.inf


def code_table(source: TextSource, found: Found) -> dict[str, Any]:
    """The ways to code the text, each with its parts, which add up."""
    rows = [
        [
            name,
            f"{length.bits_per_byte.value:.4f}",
            _interval(length),
            *(f"{part:.4f}" for part in length.shares.values()),
            f"{length.nats_per_token / math.log(2):.4f}",
            f"{length.nats_per_token:.4f}",
        ]
        for name, length in found.ways.items()
    ]
    return {
        "title": f"{source.name}: {source.num_bytes:,} bytes in {len(source.documents):,} documents",
        "columns": ["", "bits/byte", "95 % interval", "tokens", "embedding", "header", "bits/token", "nats/token"],
        "rows": rows,
        "note": f"{_capital(found.how)}. The interval is a bootstrap over {_answer(found).bits_per_byte.n} pieces of "
        "about 8 kB. Tokens, embedding and header are the shares of bits/byte, which charges them all.",
    }


def compressor_table(
    found: Found,
    sizes: Sizes,
    *,
    conditional: bool,
) -> dict[str, Any]:
    """What general-purpose compressors make of the text, and the size of corpus from which the model pays."""
    ours = _answer(found).bits_per_byte.value
    mine = ["this model", *(["—", f"{ours:.3f}"] if conditional else [f"{ours:.3f}", "—"]), "—"]
    rows = [mine]
    for name, size in sizes.items():
        if isinstance(size, str):
            rows.append([name, size, "—", "—"])
            continue
        cold, warm = size
        even = break_even(found.model_bytes, ours, cold if warm is None else warm)
        rows.append([name, f"{cold:.3f}", "—" if warm is None else f"{warm:.3f}", _amount(even)])
    note = (
        f"Break-even: bytes of such text from which on the code and the model's own {found.model_bytes:,} bytes are "
        "together smaller than the compressor's file. "
        if found.model_bytes
        else "No weights are sent: a decoder learns the same ones on its way. "
    )
    note += "Given a text, a compressor may refer to it: the fair comparison with a model that was trained on it."
    columns = ["bits/byte", "cold", "given the training text", "break-even"]
    return {"title": "Beside compressors", "columns": columns, "rows": rows, "note": note}


def statement(found: Found, source: TextSource, *, mode: str, model: str, lossless: bool) -> list[str]:
    """What the number is and under which conditions, in sentences."""
    from luthier.entropy.estimators import UPPER_BOUND

    answer = _answer(found)
    shares = answer.shares
    kind = "Estimate" if mode == "cross-fit" else "Code length"
    parts = [
        f"{kind} {answer.bits_per_byte.value:.4f} bits/byte = tokens {shares['tokens given the code']:.4f} + embedding "
        f"{shares['code']:.4f} + header {shares['header']:.4f}."
    ]
    if mode == "cross-fit":
        parts.append(
            "What a new document of this kind would cost a model that learned from the rest; no code length of this "
            "text, as each part was used to code the others."
        )
    parts.append(UPPER_BOUND)
    if not lossless:
        parts.append("The tokenizer does not reproduce this text exactly, so this is NOT an upper bound.")
    if model:
        parts.append(_history(model, source))
    return parts


def _history(model: str, source: TextSource) -> str:
    """What the model's provenance says of this very text, by its hash or its name."""
    from luthier.data.sources import HELD_OUT
    from luthier.models.load import read_provenance

    for entry in read_provenance(Path(model)).get("data", []):
        if entry.get("sha256") == source.sha256 or entry.get("name") == source.name:
            name = str(entry.get("name"))
            if name.endswith(HELD_OUT):
                return f"The model's training kept {name} away, which seems to be this text."
            return f"The model was trained on {name}, which seems to be this text: this is NOT an upper bound."
    return "Whether the model has seen this text in training is not known here."


def result(
    mode: str,
    found: Found,
    sizes: Sizes,
    words: Sequence[str],
) -> dict[str, Any]:
    """All of it, for --json."""
    ours = _answer(found).bits_per_byte.value
    compressors: dict[str, Any] = {}
    for name, size in sizes.items():
        if isinstance(size, str):
            compressors[name] = {"missing": size}
            continue
        even = break_even(found.model_bytes, ours, size[0] if size[1] is None else size[1])
        compressors[name] = {"cold": size[0], "given": size[1], "break_even": even if math.isfinite(even) else None}
    ways = {name: length.row() for name, length in found.ways.items()}
    answer = next(iter(ways.values()))
    return {
        **answer,
        "mode": mode,
        "ways": ways,
        "model_bytes": found.model_bytes,
        "compressors": compressors,
        "statement": " ".join(words),
    }


def summary(found: Found, tables: list[dict[str, Any]], words: Sequence[str]) -> dict[str, Any]:
    """What a run folder keeps and a report shows."""
    answer = _answer(found)
    tables[0] = {**tables[0], "note": f"{tables[0]['note']} {' '.join(words)}"}
    headline = {
        "bits per byte": f"{answer.bits_per_byte.value:.3f} {_interval(answer)}",
        "embedding, bits per byte": f"{answer.shares['code']:.4f}",
        "bits per token": f"{answer.nats_per_token / math.log(2):.3f}",
    }
    return {"verb": "estimate", "headline": headline, "tables": tables, "score": answer.row()}


def _answer(found: Found) -> CodeLength:
    return next(iter(found.ways.values()))


def _interval(length: CodeLength) -> str:
    interval = length.bits_per_byte
    return f"[{interval.low:.3f}, {interval.high:.3f}]" if interval.n > 1 else "—"


def _amount(number_of_bytes: float) -> str:
    """'at once', 'never', or bytes in the largest unit that leaves a number above 1."""
    if number_of_bytes == 0:
        return "at once"
    if math.isinf(number_of_bytes):
        return "never"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= size:
            return f"{number_of_bytes / size:,.1f} {unit}"
    return f"{number_of_bytes:,.0f} B"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
