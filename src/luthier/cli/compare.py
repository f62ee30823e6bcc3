"""`luthier compare A B`: how far B is from A on any text, what it weighs and how fast it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from luthier.cli.texts import first_documents, open_text, opening
from luthier.core.config import digest, to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.run import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.core.stats import Interval
    from luthier.data.sources import TextSource
    from luthier.quantize.compare import Comparison
    from luthier.quantize.speed import Speed

CONTEXT = 512  # tokens, unless asked for more
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 32, 5  # of the short measurement of speed


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Measure how far model B is from model A: divergence, agreement, perplexity, layers, size and speed."""

    a: tyro.conf.Positional[str]
    """Model folder or hub id: the original."""
    b: tyro.conf.Positional[str]
    """Model folder or hub id with the same vocabulary: its quantized or otherwise changed version."""
    data: str = "python-prose"
    """Text: a file, a folder, a hub id, python-prose, or token shards. Not the text that B was calibrated on."""
    context: int = 0
    """Tokens that the models see at most; 0: their own limit, up to 512."""
    max_bytes: int = 262_144
    """Use only the first whole documents up to this size; 0: all."""
    batch_size: int = 8
    """Windows that are read at once; changes nothing but speed and memory."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """In which both models compute; auto: as each is stored."""
    speed: bool = True
    """Also measure tokens per second of both, for some seconds; in bfloat16 where dtype is float32."""
    device: str = "auto"
    """cpu, cuda or auto."""
    out: Path | None = None
    """Run folder; by default one of its own under runs/ for each pair of models and settings."""

    def __post_init__(self) -> None:
        if self.context < 0 or self.batch_size < 1 or self.max_bytes < 0:
            raise ConfigError(
                "context and max_bytes must not be negative, batch_size at least 1", hint="leave them at their defaults"
            )


def run(config: CompareConfig, console: Console) -> None:
    """Compare, print the tables, and write them with the figures to the run folder."""
    from luthier.learn.parallel import choose_device
    from luthier.models.load import load_pretrained
    from luthier.quantize.speed import Speed

    device = choose_device(config.device)
    tokenizer = _one_tokenizer(config)
    source = first_documents(open_text(config.data, tokenizer), config.max_bytes)
    names = {"A": config.a, "B": config.b}
    with contextlib.closing(_open_run(config)) as folder:
        models = {key: load_pretrained(name, dtype=_dtype(config.dtype), device=device) for key, name in names.items()}
        found = _compare(config, models, tokenizer, source, console)
        speeds, machine = dict[str, Speed](), ""
        if config.speed:
            if config.dtype == "float32":  # in which few kernels are fast; the first pair makes room for the second
                models.clear()
                models |= {key: load_pretrained(n, dtype=_dtype("bfloat16"), device=device) for key, n in names.items()}
            speeds, machine = _speeds(models, console), _machine(models["A"])
        tables = [
            _difference_table(found, source, _note(config, found, source)),
            _side_by_side(names, found, speeds, machine),
        ]
        _write(folder, found, names, speeds, tables)
        for table in tables:
            console.table(**table)
        from luthier.report.html import write_report

        report = write_report(folder.path)
        console.print(f"report: {report}")
        console.result({**_result(found, names, speeds), "report": str(report)})


def _open_run(config: CompareConfig) -> RunFolder:
    """The run folder, emptied of what an earlier run of the same command measured."""
    identity = digest({**to_mapping(config), "out": None})
    folder = RunFolder.open(
        config.out or Path("runs") / f"compare-{identity[:8]}", to_mapping(config), may_change=("out", "device")
    )
    folder.rewind(-1)
    return folder


def _dtype(name: str) -> Any:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def _one_tokenizer(config: CompareConfig) -> PreTrainedTokenizerFast:
    from luthier.data.tokenizer import load_tokenizer, tokenizer_digest

    a, b = load_tokenizer(config.a), load_tokenizer(config.b)
    if tokenizer_digest(a) != tokenizer_digest(b):
        raise ConfigError(
            f"{config.a} and {config.b} have different tokenizers, so their tokens cannot be compared",
            hint="compare a model with its own quantized, fine-tuned or distilled version",
        )
    return a


def _compare(
    config: CompareConfig,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    console: Console,
) -> Comparison:
    from luthier.data.files import cut_paragraphs
    from luthier.data.tokenizer import encode_texts
    from luthier.quantize.compare import compare

    pieces = [piece for document in source.documents for piece in cut_paragraphs(document)]
    first = opening(tokenizer) or [tokenizer.eos_token_id]
    documents = [first + ids for ids in encode_texts(tokenizer, pieces)]
    with console.progress(sum(len(ids) - 1 for ids in documents), "compare") as advance:
        return compare(
            models["A"],
            models["B"],
            documents,
            context=_context(config, models),
            batch_size=config.batch_size,
            advance=advance,
        )


def _context(config: CompareConfig, models: Mapping[str, PreTrainedModel]) -> int:
    limit = min(getattr(model.config, "max_position_embeddings", CONTEXT) for model in models.values())
    if config.context > limit:
        raise ConfigError(
            f"context: got {config.context}, but the models read at most {limit} tokens",
            hint=f"give --context {limit} or less",
        )
    return config.context or min(limit, CONTEXT)


def _speeds(models: Mapping[str, PreTrainedModel], console: Console) -> dict[str, Speed]:
    from luthier.quantize.speed import measure_speed

    with console.progress(REPEATS + 1, "speed") as advance:
        return measure_speed(
            models, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, repeats=REPEATS, advance=advance
        )


def _difference_table(found: Comparison, source: TextSource, note: str) -> dict[str, Any]:
    percent = [100 * value for value in found.agreement[:3]]
    change = [100 * (math.exp(value) - 1) for value in found.loss_difference[:3]]
    rows = [
        ["KL(A‖B), mean", *_columns(found.kl[:3], found.documents, 5), "nats/token"],
        ["KL(A‖B), median", f"{found.quantile(50):.5f}", "—", "nats/token"],
        ["KL(A‖B), 99th percentile", f"{found.quantile(99):.5f}", "—", "nats/token"],
        ["same first choice", *_columns(percent, found.documents, 2), "% of tokens"],
        ["perplexity of B over A", *_columns(change, found.documents, 2), "% more"],
    ]
    if found.layer_errors:
        rows.append(["hidden states after the last layer", f"{found.layer_errors[-1]:.4f}", "—", "‖A − B‖ / ‖A‖"])
    title = f"B against A on {source.name}: {found.tokens:,} tokens, {found.documents:,} documents"
    return {"title": title, "columns": ["", "value", "95 % interval", "unit"], "rows": rows, "note": note}


def _columns(values: Any, documents: int, digits: int) -> list[str]:
    value, low, high = (f"{number:.{digits}f}" for number in values)
    return [value, f"[{low}, {high}]" if documents > 1 else "—"]


def _side_by_side(
    names: Mapping[str, str], found: Comparison, speeds: Mapping[str, Speed], machine: str
) -> dict[str, Any]:
    sizes = {key: weight_bytes(name) for key, name in names.items()}
    rows = [
        ["model", *names.values()],
        ["weights on disk", *(f"{size / 1e6:,.1f} MB" if size else "—" for size in sizes.values())],
        ["perplexity", *(f"{value:.3f}" for value in found.perplexities)],
    ]
    if speeds:
        rows.append(["prefill, tokens/s", *(_rate(speed.prefill) for speed in speeds.values())])
        rows.append(["decode, tokens/s", *(_rate(speed.decode) for speed in speeds.values())])
    note = (
        f"Speed: batch of one, a prompt of {PROMPT_TOKENS} tokens and {NEW_TOKENS} more; medians of {REPEATS} "
        f"interleaved rounds with 95 % intervals, {machine}."
    )
    return {"title": "Side by side", "columns": ["", *names], "rows": rows, "note": note if speeds else ""}


def _rate(interval: Interval) -> str:
    return f"{interval.value:,.1f} [{interval.low:,.1f}, {interval.high:,.1f}]"


def weight_bytes(name: str) -> int:
    """Bytes of the weight files of a model folder, 0 for a hub id."""
    return sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))


def _machine(model: PreTrainedModel) -> str:
    import torch

    where = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else torch.cuda.get_device_name()
    return f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}, {where}"


def _note(config: CompareConfig, found: Comparison, source: TextSource) -> str:
    from luthier.models.load import read_provenance

    parts = [f"Both compute in {config.dtype}. The interval is a bootstrap over pieces of at most about 8 kB."]
    if not found.layer_errors:
        parts.append("The models have different shapes, so that their layers are not compared.")
    calibration = [entry.get("name", "") for entry in read_provenance(Path(config.b)).get("data", [])]
    if any(name in (config.data, source.name) for name in calibration):
        parts.append("B was calibrated on this very corpus, which favours it: give another --data for a fair number.")
    return " ".join(parts)


def _write(
    folder: RunFolder,
    found: Comparison,
    names: Mapping[str, str],
    speeds: Mapping[str, Speed],
    tables: list[dict[str, Any]],
) -> None:
    for layer, error in enumerate(found.layer_errors):
        folder.log("hidden", layer=layer, relative_error=error)
    for percent, nats in found.kl_quantiles:
        folder.log("divergence", percent=percent, nats=nats)
    before, after = found.perplexities
    sizes = [weight_bytes(name) / 1e6 for name in names.values()]
    headline = {
        "KL(A‖B), nats/token": found.kl.text(4) if found.documents > 1 else f"{found.kl.value:.4f}",
        "same first choice": f"{100 * found.agreement.value:.2f} %",
        "perplexity of B": f"{after:.3f} (A: {before:.3f})",
    }
    if all(sizes):
        headline["weights of B on disk"] = f"{sizes[1]:,.1f} MB (A: {sizes[0]:,.1f})"
    if speeds:
        headline["decode of B, tokens/s"] = f"{speeds['B'].decode.value:,.1f} (A: {speeds['A'].decode.value:,.1f})"
    folder.write_summary({"verb": "compare", "headline": headline, "tables": tables})


def _result(found: Comparison, names: Mapping[str, str], speeds: Mapping[str, Speed]) -> dict[str, Any]:
    before, after = found.perplexities
    return {
        "kl": found.kl._asdict(),
        "kl_quantiles": {f"{percent:g}": nats for percent, nats in found.kl_quantiles},
        "agreement": found.agreement._asdict(),
        "perplexity": {"A": before, "B": after},
        "loss_difference": found.loss_difference._asdict(),
        "layer_errors": list(found.layer_errors),
        "tokens": found.tokens,
        "documents": found.documents,
        "bytes": {key: weight_bytes(name) for key, name in names.items()},
        "speed": {
            key: {"prefill": speed.prefill._asdict(), "decode": speed.decode._asdict()} for key, speed in speeds.items()
        },
    }
