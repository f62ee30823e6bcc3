"""`luthier estimate TEXT`: how many bits a text holds at most, with everything charged, beside real compressors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from luthier.cli import estimate_view as view
from luthier.cli.estimate_view import Found, Sizes
from luthier.cli.texts import first_documents, open_text, opening
from luthier.core.checks import above, at_least
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, MissingExtra
from luthier.core.run import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.data.sources import TextSource
    from luthier.entropy.code_length import CodeLength
    from luthier.entropy.prequential import Floats, Learning
    from luthier.learn.evaluate import TokenStream
    from luthier.learn.objectives import CausalLoss

Baseline = Literal["gzip", "bzip2", "xz", "zstd", "ppmd", "zpaq"]
BASELINES: tuple[Baseline, ...] = ("gzip", "bzip2", "xz", "zstd", "ppmd", "zpaq")
LONGEST_CONTEXT = 2048  # tokens of a model that was trained before, unless asked for more
FRESH_CONTEXT = 256  # bytes of a model that begins with this text


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Measure an upper bound on the entropy of a text in bits per byte, with an interval and everything charged."""

    data: tyro.conf.Positional[str]
    """Text: a file, a folder, a hub id, python-prose, or token shards."""
    model: str = ""
    """Causal language model (folder or hub id), or the model folder of a train-eem run; empty: one that begins here."""
    mode: Literal["held-out", "prequential", "cross-fit"] = "held-out"
    """held-out: the model as it is; prequential: it learns as it codes; cross-fit: it learns from the other folds."""
    given: str = ""
    """Text that the compressors may look at first, as the model did in training: a fair, conditional comparison."""
    baselines: tuple[Baseline, ...] = BASELINES
    """Compressors to compare with."""
    compare: bool = True
    """Whether to compare with compressors at all."""
    context: int = 0
    """Tokens that a causal model sees at most; 0: its own limit, up to 2048, and 256 for one that begins here."""
    max_bytes: int = 0
    """Use only the first whole documents up to this size; 0: all."""
    batch_size: int = 8
    """Windows that are scored at once; with prequential and cross-fit also those of an update."""
    passes: int = 8
    """Prequential: updates after each block. Cross-fit: passes through the other folds."""
    learning_rate: float = 2e-3
    """For prequential and cross-fit; 1e-4 suits a large model that was trained before."""
    folds: int = 5
    """Parts of the text for cross-fit."""
    seed: int = 0
    """Decides the weights of a model that begins here, and the order in which it learns."""
    device: str = "auto"
    """cpu, cuda or auto."""
    out: Path | None = None
    """Run folder for the result."""

    def __post_init__(self) -> None:
        at_least(self, 0, "context", "max_bytes", "seed")
        at_least(self, 1, "batch_size", "passes")
        at_least(self, 2, "folds")
        above(self, 0, "learning_rate")
        if self.mode == "held-out" and not self.model:
            raise ConfigError(
                "held-out needs a model that was trained before",
                hint="give --model FOLDER, or --mode prequential, which needs none",
            )


def run(config: EstimateConfig, console: Console) -> None:
    """Measure, print the tables and what they mean, and write them to the run folder if one is asked for."""
    from luthier.data.compressors import missing
    from luthier.data.tokenizer import byte_tokenizer, is_lossless
    from luthier.learn.parallel import choose_device

    if config.compare and config.baselines != BASELINES:
        for name in config.baselines:
            if reason := missing(name):
                raise MissingExtra(f"baselines: {name} cannot run here", hint=reason)
    with _open_run(config) as folder:
        tokenizer = open_tokenizer(config.model) if config.model else byte_tokenizer()
        source = first_documents(open_text(config.data, tokenizer), config.max_bytes)
        given = open_text(config.given, tokenizer) if config.given else None
        found = _measure(config, tokenizer, source, choose_device(config.device), console)
        sizes = _compress(config, source, given, console)
        lossless = is_lossless(tokenizer, source.documents)
        tables = [view.code_table(source, found)]
        if config.compare:
            tables.append(view.compressor_table(found, sizes, conditional=given is not None))
        for table in tables:
            console.table(**table)
        words = view.statement(found, source, mode=config.mode, model=config.model, lossless=lossless)
        for sentence in words:
            console.print(sentence)
        console.result(view.result(config.mode, found, sizes, words))
        if folder is not None:
            folder.write_summary(view.summary(found, tables, words))


@contextlib.contextmanager
def _open_run(config: EstimateConfig) -> Iterator[RunFolder | None]:
    if config.out is None:
        yield None
        return
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=("out", "device"))) as folder:
        yield folder


# Measuring


def _measure(
    config: EstimateConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    device: torch.device,
    console: Console,
) -> Found:
    if config.model and is_eem(config.model):
        if config.mode != "held-out":
            raise ConfigError(
                f"{config.mode}: an entropy-estimation model does not learn on the way",
                hint="give a causal language model, or none, or --mode held-out",
            )
        return _with_codes(config, tokenizer, source, device)
    measure = {"held-out": _held_out, "prequential": _prequential, "cross-fit": _cross_fit}[config.mode]
    return measure(config, tokenizer, source, device, console)


def is_eem(model: str) -> bool:
    """Whether a model is an entropy-estimation model, which has codes."""
    from luthier.core.files import read_json

    file = Path(model) / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "entropy_estimation"


def open_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model of either kind."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.entropy.network_config import register_config

    register_config()  # so that the library knows what it looks at
    return load_tokenizer(model)


def _with_codes(
    config: EstimateConfig, tokenizer: PreTrainedTokenizerFast, source: TextSource, device: torch.device
) -> Found:
    """An entropy-estimation model: three ways to code, each with its whole cost."""
    from luthier.entropy.code_length import cut, measure
    from luthier.entropy.network import load_entropy_model

    model = load_entropy_model(Path(config.model), device=device)
    if config.context not in (0, model.eem.window):
        raise ConfigError(
            f"context: got {config.context}, but this model reads segments of {model.eem.window} tokens",
            hint="leave --context away",
        )
    segments = cut(_pieces(tokenizer, source), model.eem.window)
    measured = measure(model, segments, batch_size=config.batch_size, padding_side=model.eem.padding_side)
    ways = {
        "for each segment the cheaper way": measured.cheaper,
        "a code for every segment": measured.code,
        "no codes: a causal model": measured.null,
    }
    how = (
        f"{len(segments.ids):,} segments of {model.eem.window} tokens, each read with a fresh context; a code costs "
        f"{model.code_bits:g} bits and pays for itself in {100 * measured.coded:.1f} % of them"
    )
    return Found(ways, _weight_bytes(model), how)


def _held_out(
    config: EstimateConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    device: torch.device,
    console: Console,
) -> Found:
    from luthier.learn.evaluate import stream_nll
    from luthier.learn.parallel import Ranks

    objective, context = _causal(config, tokenizer, device)
    stream = _pieces(tokenizer, source, opened=True)
    nats = stream_nll(
        objective,
        stream.tokens,
        start_token=tokenizer.eos_token_id,
        context=context,
        stride=max(1, context // 2),
        batch_size=config.batch_size,
        who=Ranks(device=device),
    )
    for bos in opening(tokenizer):
        nats[stream.tokens == bos] = 0  # it is always there, so it tells nothing and costs nothing
    how = f"contexts of {context} tokens that advance by half"
    return Found({"code length": _by_piece(stream, nats)}, _weight_bytes(objective.model), how)


def _prequential(
    config: EstimateConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    device: torch.device,
    console: Console,
) -> Found:
    from luthier.entropy.prequential import prequential_nats

    objective, context = _causal(config, tokenizer, device)
    stream = _pieces(tokenizer, source)
    with console.progress(len(stream.tokens), "learn and code") as advance:
        nats = prequential_nats(
            objective,
            stream.tokens,
            start_token=tokenizer.eos_token_id,
            learning=_learning(config, context),
            device=device,
            progress=advance,
        )
    how = f"each block coded before it was learned, contexts of {context} tokens, {config.passes} updates a block"
    sent = _weight_bytes(objective.model) if config.model else 0
    return Found({"prequential code length": _by_piece(stream, nats)}, sent, how)


def _cross_fit(
    config: EstimateConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: TextSource,
    device: torch.device,
    console: Console,
) -> Found:
    import numpy as np

    from luthier.entropy.prequential import cross_fit_nats

    (objective, context), stream = _causal(config, tokenizer, device), _pieces(tokenizer, source)
    pieces = np.split(stream.tokens, stream.starts[1:])
    if len(pieces) < config.folds:
        raise ConfigError(
            f"folds: got {config.folds}, but the text has {len(pieces)} pieces of about 8 kB",
            hint="give more text, fewer --folds, or --mode prequential",
        )
    with console.progress(config.folds, "cross-fit") as advance:
        nats = cross_fit_nats(
            lambda: _causal(config, tokenizer, device)[0],
            pieces,
            start_token=tokenizer.eos_token_id,
            folds=config.folds,
            learning=_learning(config, context),
            device=device,
            progress=advance,
        )
    how = f"each of {config.folds} folds scored by a model that learned from the others, contexts of {context} tokens"
    sent = _weight_bytes(objective.model)
    return Found({"cross-fitted loss": _by_piece(stream, np.concatenate(nats))}, sent, how)


def _causal(config: EstimateConfig, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> tuple[CausalLoss, int]:
    """The model with its loss, fp32, and the context to use: a trained one, or random weights."""
    from luthier.learn.objectives import CausalLoss, has_plain_head

    model = _load(config.model, device) if config.model else _begin(tokenizer, config, device)
    return CausalLoss(model, plain_head=has_plain_head(model)), _context(config, model)


def _load(name: str, device: torch.device) -> PreTrainedModel:
    import torch

    from luthier.models.load import load_pretrained

    return load_pretrained(name, dtype=torch.float32, device=device)


def _begin(tokenizer: PreTrainedTokenizerFast, config: EstimateConfig, device: torch.device) -> PreTrainedModel:
    """A small model with random weights."""
    import torch

    from luthier.models.initialization import initialize
    from luthier.models.instella import InstellaForCausalLM
    from luthier.models.instella_config import sized_config

    settings = sized_config("nano", tokenizer, max_position_embeddings=_context(config, None))
    model = InstellaForCausalLM._from_config(settings, dtype=torch.float32)
    initialize(model, config.seed)
    return model.to(device).eval()


def _context(config: EstimateConfig, model: PreTrainedModel | None) -> int:
    if model is None or not config.model:
        return config.context or FRESH_CONTEXT
    return causal_context(config.context, config.model, model)


def causal_context(asked: int, name: str, model: PreTrainedModel) -> int:
    """Tokens that a causal model sees: as asked, or its limit up to 2048. Raises: ConfigError beyond its limit."""
    limit: int = getattr(model.config, "max_position_embeddings", LONGEST_CONTEXT)
    if asked > limit:
        raise ConfigError(
            f"context: got {asked}, but {name} reads at most {limit} tokens", hint=f"give --context {limit} or less"
        )
    return asked or min(limit, LONGEST_CONTEXT)


def _learning(config: EstimateConfig, context: int) -> Learning:
    from luthier.entropy.prequential import Learning

    return Learning(
        context=context,
        windows=config.batch_size,
        learning_rate=config.learning_rate,
        passes=config.passes,
        seed=config.seed,
    )


def _pieces(tokenizer: PreTrainedTokenizerFast, source: TextSource, *, opened: bool = False) -> TokenStream:
    """The documents as one stream in pieces of about 8 kB, which the interval is over; each document ends with EOS.

    opened: with the token that opens a document before each, for models that have one.
    """
    import numpy as np

    from luthier.data.files import cut_paragraphs
    from luthier.data.tokenizer import encode_texts
    from luthier.learn.evaluate import TokenStream

    documents = [cut_paragraphs(document) for document in source.documents]
    pieces = [piece for document in documents for piece in document]
    encoded = encode_texts(tokenizer, pieces)
    last = 0
    for document in documents:
        first, last = last, last + len(document)
        encoded[first][:0] = opening(tokenizer) if opened else []
        encoded[last - 1].append(tokenizer.eos_token_id)
    return TokenStream(
        tokens=np.concatenate([np.asarray(ids, np.int64) for ids in encoded]),
        starts=np.cumsum([0, *(len(ids) for ids in encoded[:-1])]),
        num_bytes=np.asarray([len(piece.encode()) for piece in pieces]),
    )


def _by_piece(stream: TokenStream, nats: Floats) -> CodeLength:
    """A causal model's code length: nothing but tokens, all of them charged."""
    import numpy as np

    from luthier.entropy.code_length import CodeLength

    nothing = np.zeros(len(stream.starts))
    return CodeLength(
        token_nats=np.add.reduceat(nats, stream.starts),
        code_bits=nothing,
        header_bits=nothing,
        num_tokens=np.diff(np.append(stream.starts, len(nats))),
        num_bytes=stream.num_bytes,
    )


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# Compressors


def _compress(config: EstimateConfig, source: TextSource, given: TextSource | None, console: Console) -> Sizes:
    """Bits per byte of each compressor, cold and conditional; a text that says why where one cannot run."""
    from luthier.data.compressors import compressed_bytes, missing

    text = "".join(source.documents).encode()
    known = "".join(given.documents).encode() if given else b""
    found: dict[str, tuple[float, float | None] | str] = {}
    for name in config.baselines if config.compare else ():
        if reason := missing(name):
            found[name] = reason
            continue
        console.status(f"compress: {name}")
        cold = 8 * compressed_bytes(name, text) / source.num_bytes
        found[name] = (cold, 8 * compressed_bytes(name, text, given=known) / source.num_bytes if given else None)
    return found
