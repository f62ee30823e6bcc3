"""`luthier train-eem`: open the corpora, train an entropy-estimation model, and write its folder and a report."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from luthier.cli.corpora import prepare_corpus
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import DataError, Interrupted
from luthier.core.run import RunFolder
from luthier.entropy.config import TrainEemConfig

if TYPE_CHECKING:
    from luthier.entropy.code_length import CodeLength, Measured
    from luthier.entropy.training import TrainedEem
    from luthier.learn.parallel import Ranks
    from luthier.learn.prepare import Corpus

BOUND_NOTE = (
    "Each row is a code length, everything charged: an upper bound, in expectation, of the entropy of such text in "
    "segments that are read with a fresh context. What the tokens cost once the code is known is no bound by itself."
)


def run(config: TrainEemConfig, console: Console) -> None:
    """Train or resume."""
    from luthier.data.mixture import WindowMixture
    from luthier.entropy.code_length import cut
    from luthier.entropy.training import build_model, train_eem
    from luthier.learn.parallel import ranks
    from luthier.learn.prepare import token_stream

    with ranks(config.device) as who, contextlib.closing(_open_run(config)) as folder:
        corpus = _corpus(config, who, console)
        mixture = WindowMixture(
            corpus.training, sequence_length=config.window, batch_size=config.batch_size, seed=config.seed
        )
        outcome = train_eem(
            config,
            build_model(config, _vocab_size(corpus)),
            mixture,
            cut(token_stream(corpus.held_out), config.window),
            who=who,
            checkpoints=folder.checkpoints,
            run=folder,
            console=console,
        )
        if outcome.held_out is None:
            raise Interrupted(
                f"stopped at step {outcome.state.step} of {config.steps}, state saved",
                hint="run the same command again to go on from there",
            )
        _finish(config, folder, corpus, outcome, outcome.held_out, console)


def _open_run(config: TrainEemConfig) -> RunFolder:
    return RunFolder.open(config.out, to_mapping(config), may_change=config.RESUMABLE_CHANGES)


def _corpus(config: TrainEemConfig, who: Ranks, console: Console) -> Corpus:
    from luthier.data.tokenizer import byte_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else byte_tokenizer()
    corpus = prepare_corpus(
        config, who, console, tokenizer=tokenizer, vocab_size=len(tokenizer), sequence_length=config.window
    )
    for part in [*corpus.training, corpus.held_out]:
        if part.mask is not None:
            raise DataError(f"{part.name}: conversations, expected text", hint="give a corpus whose rows have `text`")
    return corpus


def _vocab_size(corpus: Corpus) -> int:
    from luthier.data.tokenizer import num_ids

    return num_ids(corpus.tokenizer)


def _finish(
    config: TrainEemConfig, run: RunFolder, corpus: Corpus, outcome: TrainedEem, measured: Measured, console: Console
) -> None:
    from luthier.entropy.training import metrics
    from luthier.models.load import save_pretrained
    from luthier.report.html import write_report

    figures = metrics(measured)
    provenance = {
        "verb": "train-eem",
        "config": to_mapping(config),
        "parents": [],
        "data": [{"name": part.name, "sha256": part.source_sha256} for part in [*corpus.training, corpus.held_out]],
        "env": run.env,
        "metrics": figures,
    }
    save_pretrained(outcome.model, corpus.tokenizer, config.out / "model", provenance)
    summary = _summary(outcome, measured)
    run.write_summary({**summary, "held_out": figures})
    report = write_report(run.path)
    for table in summary["tables"]:
        console.table(**table)
    for name, value in summary["headline"].items():
        console.print(f"{name}: {value}")
    console.print(f"model: {config.out / 'model'}")
    console.print(f"report: {report}")
    console.result({**figures, "model": str(config.out / "model"), "report": str(report)})


def _summary(outcome: TrainedEem, measured: Measured) -> dict[str, Any]:
    state, best = outcome.state, measured.cheaper
    ways = {
        "no code: a causal model": measured.null,
        "a code for every segment": measured.code,
        "the cheaper for each segment": best,
    }
    table = {
        "title": f"Code length of held-out text: {int(best.num_bytes.sum()):,} bytes, {len(best.bits):,} documents",
        "columns": ["way", "bits per byte", "95 % interval", "tokens given the code", "code", "header"],
        "rows": [[name, *_cells(length)] for name, length in ways.items()],
        "note": BOUND_NOTE,
    }
    return {
        "verb": "train-eem",
        "headline": {
            "held-out bits per byte": f"{best.bits_per_byte.value:.3f} {_interval(best)}, everything charged",
            "segments whose code pays": f"{100 * measured.coded:.1f} %",
            "code": f"{outcome.model.code_bits:g} bits a segment",
            "parameters": f"{sum(p.numel() for p in outcome.model.parameters()):,}",
            "trained on": f"{state.tokens:,} tokens",
            "training time": f"{state.seconds / 60:.1f} min",
        },
        "tables": [table],
    }


def _cells(length: CodeLength) -> list[str]:
    return [f"{length.bits_per_byte.value:.4f}", _interval(length), *(f"{part:.4f}" for part in length.shares.values())]


def _interval(length: CodeLength) -> str:
    interval = length.bits_per_byte
    return f"[{interval.low:.3f}, {interval.high:.3f}]" if interval.n > 1 else "—"
