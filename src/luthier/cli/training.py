"""What the verbs on the training loop share: run folder and corpora, what it would cost, model folder and report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.cli.corpora import prepare_corpus
from luthier.cli.starts import has_chatted, open_start, parent, start_tokenizer
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import Interrupted
from luthier.core.run import RunFolder
from luthier.models.arithmetic import Dimensions
from luthier.train.config import PretrainConfig
from luthier.train.extend_config import ExtendConfig
from luthier.train.plan import DEVICE_COUNTS, hour_rows, plan_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.learn.parallel import Ranks
    from luthier.learn.prepare import Corpus
    from luthier.train.pretrain import Pretrained
    from luthier.train.start import ModelStart

VerbConfig = PretrainConfig | ExtendConfig


def tell_cost(
    title: str,
    config: PretrainConfig,
    console: Console,
    *,
    size: Dimensions | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Print what a run would cost, after some `extra` rows; `size` is that of a start."""
    rows = [*(extra or {}).items(), *plan_rows(config, size)]
    console.table(title, ("quantity", "value"), rows)
    columns = ("device", *(f"× {count}" for count in DEVICE_COUNTS))
    console.table("hours at an assumed MFU of 40 %", columns, hour_rows(config, size))
    console.result(dict(rows))


def run_training(
    verb: str,
    config: VerbConfig,
    settings: PretrainConfig,
    console: Console,
    train: Callable[..., Pretrained],
    *,
    check: Callable[[ModelStart], None],
    headline: Callable[[Pretrained], Mapping[str, str]] = lambda outcome: {},
) -> None:
    """Train or resume; under torchrun every rank comes here.

    config: of the verb, as it is stored; settings: the same for the loop. train: `pretrain` or what wraps it, with its
    config. check: refuses a start that does not suit. headline: what the summary says beside the usual.
    """
    from luthier.data.mixture import WindowMixture
    from luthier.learn.parallel import ranks
    from luthier.learn.prepare import token_stream

    with ranks(settings.device) as who, _open_run(config, who) as folder:
        start = open_start(settings.start, settings.optimizer) if settings.start else None
        if start is not None:
            check(start)
        corpus = prepare_corpus(
            settings,
            who,
            console,
            tokenizer=_tokenizer(settings, start),
            vocab_size=settings.vocab_size,
            sequence_length=settings.sequence_length,
        )
        mixture = WindowMixture(
            corpus.training,
            settings.weights or None,
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        held_out = token_stream(corpus.held_out)
        outcome = train(
            corpus.tokenizer,
            mixture,
            held_out,
            who=who,
            checkpoints=settings.out / "checkpoints",
            run=folder,
            console=console,
            start=start,
        )
        if not outcome.finished:
            raise Interrupted(
                f"stopped at step {outcome.state.step} of {settings.steps}, state saved",
                hint="run the same command again to go on from there",
            )
        if folder is not None:
            summary = _summary(verb, settings, outcome, headline(outcome), replies_only=held_out.mask is not None)
            _finish(config, start, folder, corpus, outcome, summary, console)
        who.barrier()


def _tokenizer(settings: PretrainConfig, start: ModelStart | None) -> PreTrainedTokenizerFast | None:
    """The start's, or the one that is given; None: one has to be trained."""
    from luthier.data.tokenizer import load_tokenizer

    if start is not None:
        return start_tokenizer(start, settings.tokenizer)
    return load_tokenizer(settings.tokenizer) if settings.tokenizer else None


@contextlib.contextmanager
def _open_run(config: VerbConfig, who: Ranks) -> Iterator[RunFolder | None]:
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


def _finish(
    config: VerbConfig,
    start: ModelStart | None,
    run: RunFolder,
    corpus: Corpus,
    outcome: Pretrained,
    summary: dict[str, Any],
    console: Console,
) -> None:
    from luthier.models.load import save_pretrained
    from luthier.report.html import write_report

    conversations = corpus.held_out.mask is not None
    provenance = {
        "verb": summary["verb"],
        "chat": conversations or (start is not None and has_chatted(start)),  # it learned from conversations
        "config": to_mapping(config),
        "parents": [] if start is None else [parent(start)],
        "data": [{"name": part.name, "sha256": part.source_sha256} for part in [*corpus.training, corpus.held_out]],
        "env": run.env,
        "metrics": outcome.held_out,
    }
    save_pretrained(outcome.model, corpus.tokenizer, run.path / "model", provenance, state_dict=outcome.state_dict)
    run.write_summary(summary)
    report = write_report(run.path)
    for name, value in summary["headline"].items():
        console.print(f"{name}: {value}")
    console.print(f"model: {run.path / 'model'}")
    console.print(f"report: {report}")
    console.result({**outcome.held_out, "model": str(run.path / "model"), "report": str(report)})


def _summary(
    verb: str, settings: PretrainConfig, outcome: Pretrained, extra: Mapping[str, str], *, replies_only: bool
) -> dict[str, Any]:
    from luthier.learn.evaluate import interval_text

    score, state = outcome.held_out, outcome.state
    counted = "; of conversations, only the replies count" if replies_only else ""
    windows = f"windows of {settings.sequence_length} tokens that advance by half"
    return {
        "verb": verb,
        "headline": {
            "held-out bits per byte": f"{score['bits_per_byte']:.3f} {interval_text(score)}",
            "held-out loss": f"{score['loss']:.3f} nats/token",
            **extra,
            "parameters": f"{sum(w.numel() for w in outcome.state_dict.values()):,}",
            "trained on": f"{state.tokens:,} tokens",
            "training time": f"{state.seconds / 60:.1f} min",
            "speed": f"{state.tokens / state.seconds:,.0f} tokens/s",
        },
        "tables": [],
        "held_out": score,
        "context": f"{windows}; {score['documents']} documents{counted}",
    }
