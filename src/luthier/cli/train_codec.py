"""`luthier train-codec`: train the compressor's byte-level network, and write it in integers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from luthier.cli.corpora import prepare_corpus
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import DataError, Interrupted
from luthier.core.run import RunFolder
from luthier.entropy.codec.byte_config import TrainCodecConfig

if TYPE_CHECKING:
    from luthier.entropy.codec.byte_training import TrainedNetwork
    from luthier.learn.parallel import Ranks
    from luthier.learn.prepare import Corpus


def run(config: TrainCodecConfig, console: Console) -> None:
    """Train or resume, then write network.bin and a report."""
    from luthier.data.mixture import WindowMixture
    from luthier.entropy.codec.byte_training import train_codec
    from luthier.learn.parallel import ranks
    from luthier.learn.prepare import token_stream

    opened = RunFolder.open(config.out, _settings(config), may_change=config.RESUMABLE_CHANGES)
    with ranks(config.device) as who, contextlib.closing(opened) as folder:
        corpus = _corpus(config, who, console)
        mixture = WindowMixture(
            corpus.training, sequence_length=config.sequence_length, batch_size=config.batch_size, seed=config.seed
        )
        provenance = {
            "verb": "train-codec",
            "config": _settings(config),
            "data": [{"name": part.name, "sha256": part.source_sha256} for part in [*corpus.training, corpus.held_out]],
        }
        outcome = train_codec(
            config,
            mixture,
            token_stream(corpus.held_out).tokens,
            provenance,
            who=who,
            checkpoints=folder.checkpoints,
            run=folder,
            console=console,
        )
        _finish(config, folder, outcome, console)


def _settings(config: TrainCodecConfig) -> dict[str, Any]:
    """The settings as they are kept: without those of codes when there are none, so that older runs can be resumed."""
    unused = () if config.code_dims else config.CODE_SETTINGS
    return {name: value for name, value in to_mapping(config).items() if name not in unused}


def _corpus(config: TrainCodecConfig, who: Ranks, console: Console) -> Corpus:
    from luthier.data.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    corpus = prepare_corpus(
        config,
        who,
        console,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        sequence_length=config.sequence_length,
    )
    for part in [*corpus.training, corpus.held_out]:
        if part.mask is not None:
            raise DataError(f"{part.name}: conversations, expected text", hint="give a corpus whose rows have `text`")
    return corpus


def _finish(config: TrainCodecConfig, folder: RunFolder, outcome: TrainedNetwork, console: Console) -> None:
    from luthier.entropy.codec.integer_weights import save
    from luthier.report.html import write_report

    state, scores = outcome.state, outcome.held_out
    if outcome.weights is None or scores is None:
        raise Interrupted(
            f"stopped at step {state.step} of {config.steps}, state saved",
            hint="run the same command again to go on from there",
        )
    file = config.out / "network.bin"
    save(outcome.weights, file)
    headline = {
        "held-out bits per byte, integers": f"{scores['integer']:.4f}",
        "the same in floating point": f"{scores['float']:.4f}",
        "parameters": f"{sum(p.numel() for p in outcome.model.parameters()):,}",
        "file": f"{file.stat().st_size:,} bytes",
        "trained on": f"{state.tokens:,} bytes",
        "training time": f"{state.seconds / 60:.1f} min",
    }
    folder.write_summary({"verb": "train-codec", "headline": headline, "tables": [], "held_out": scores})
    report = write_report(folder.path)
    for name, value in headline.items():
        console.print(f"{name}: {value}")
    console.print(f"network: {file}")
    console.print(f"report: {report}")
    console.result({**scores, "network": str(file), "sha256": outcome.weights.sha256, "report": str(report)})
