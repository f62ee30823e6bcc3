"""`luthier pretrain`: open the corpora, hand tokens and a config to training, and write a model folder and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from luthier.cli.corpora import prepare_corpus
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import Interrupted
from luthier.core.run import RunFolder
from luthier.train.config import PretrainConfig
from luthier.train.plan import DEVICE_COUNTS, hour_rows, plan_rows

if TYPE_CHECKING:
    from luthier.learn.parallel import Ranks
    from luthier.learn.prepare import Corpus
    from luthier.train.pretrain import Pretrained


def dry_run(config: PretrainConfig, console: Console) -> None:
    """Print what the run would cost."""
    rows = plan_rows(config)
    console.table(f"pretrain {config.size}", ("quantity", "value"), rows)
    columns = ("device", *(f"× {count}" for count in DEVICE_COUNTS))
    console.table("hours at an assumed MFU of 40 %", columns, hour_rows(config))
    console.result(dict(rows))


def run(config: PretrainConfig, console: Console) -> None:
    """Train or resume; under torchrun every rank comes here."""
    from luthier.data.mixture import WindowMixture
    from luthier.data.tokenizer import load_tokenizer
    from luthier.learn.parallel import ranks
    from luthier.learn.prepare import token_stream
    from luthier.train.pretrain import pretrain

    with ranks(config.device) as who, _open_run(config, who) as folder:
        corpus = prepare_corpus(
            config,
            who,
            console,
            tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer else None,
            vocab_size=config.vocab_size,
            sequence_length=config.sequence_length,
        )
        mixture = WindowMixture(
            corpus.training,
            config.weights or None,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        outcome = pretrain(
            config,
            corpus.tokenizer,
            mixture,
            token_stream(corpus.held_out),
            who=who,
            checkpoints=config.out / "checkpoints",
            run=folder,
            console=console,
        )
        if not outcome.finished:
            raise Interrupted(
                f"stopped at step {outcome.state.step} of {config.steps}, state saved",
                hint="run the same command again to go on from there",
            )
        if folder is not None:
            _finish(config, folder, corpus, outcome, console)
        who.barrier()


@contextlib.contextmanager
def _open_run(config: PretrainConfig, who: Ranks) -> Iterator[RunFolder | None]:
    """The run folder on the main rank. The others wait until it has been accepted."""
    run = None
    with who.main_first():
        if who.is_main:
            run = RunFolder.open(config.out, to_mapping(config), may_change=config.RESUMABLE_CHANGES)
    try:
        yield run
    finally:
        if run is not None:
            run.close()


def _finish(config: PretrainConfig, run: RunFolder, corpus: Corpus, outcome: Pretrained, console: Console) -> None:
    from luthier.models.load import save_pretrained
    from luthier.report.html import write_report

    summary = _summary(config, outcome, replies_only=corpus.held_out.mask is not None)
    provenance = {
        "verb": "pretrain",
        "chat": corpus.held_out.mask is not None,  # it learned from conversations
        "config": to_mapping(config),
        "parents": [],
        "data": [{"name": part.name, "sha256": part.source_sha256} for part in [*corpus.training, corpus.held_out]],
        "env": run.env,
        "metrics": outcome.held_out,
    }
    save_pretrained(outcome.model, corpus.tokenizer, config.out / "model", provenance, state_dict=outcome.state_dict)
    run.write_summary(summary)
    report = write_report(run.path)
    for name, value in summary["headline"].items():
        console.print(f"{name}: {value}")
    console.print(f"model: {config.out / 'model'}")
    console.print(f"report: {report}")
    console.result({**outcome.held_out, "model": str(config.out / "model"), "report": str(report)})


def _summary(config: PretrainConfig, outcome: Pretrained, *, replies_only: bool) -> dict[str, Any]:
    from luthier.learn.evaluate import interval_text

    score, state = outcome.held_out, outcome.state
    counted = "; of conversations, only the replies count" if replies_only else ""
    return {
        "verb": "pretrain",
        "headline": {
            "held-out bits per byte": f"{score['bits_per_byte']:.3f} {interval_text(score)}",
            "held-out loss": f"{score['loss']:.3f} nats/token",
            "parameters": f"{sum(w.numel() for w in outcome.state_dict.values()):,}",
            "trained on": f"{state.tokens:,} tokens",
            "training time": f"{state.seconds / 60:.1f} min",
            "speed": f"{state.tokens / state.seconds:,.0f} tokens/s",
        },
        "tables": [],
        "held_out": score,
        "context": (
            f"windows of {config.sequence_length} tokens that advance by half; {score['documents']} documents{counted}"
        ),
    }
