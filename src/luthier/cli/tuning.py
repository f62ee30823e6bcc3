"""What the stages on Hugging Face trainers share: open the run and the model, write the tuned model and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import Interrupted, require
from luthier.core.run import RunFolder
from luthier.learn.tuning_config import TuningConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from luthier.data.row_source import RowSource
    from luthier.distill.distill_config import DistillConfig
    from luthier.learn.parallel import Ranks
    from luthier.learn.tuning import Tuned


@contextlib.contextmanager
def open_run(config: TuningConfig | DistillConfig, who: Ranks) -> Iterator[RunFolder | None]:
    """The run folder on the main rank. The others wait until it has been accepted."""
    for package in ("trl", "datasets", "accelerate"):
        require(package, "train")
    run = None
    with who.main_first():
        if who.is_main:
            run = RunFolder.open(config.out, to_mapping(config), may_change=config.RESUMABLE_CHANGES)
    try:
        yield run
    finally:
        if run is not None:
            run.close()


def opened(config: TuningConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model to start from, in fp32 (the weights that the optimizer holds), and its tokenizer."""
    import torch

    from luthier.data.tokenizer import load_tokenizer
    from luthier.models.load import load_pretrained

    return load_pretrained(config.model, dtype=torch.float32), load_tokenizer(config.model)


def finish(
    config: TuningConfig,
    verb: str,
    tuned: Tuned,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Sequence[RowSource],
    run: RunFolder | None,
    console: Console,
    headline: Mapping[str, str],
    *,
    metrics: Mapping[str, Any],
    tables: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write model folder, summary and report on the main rank. Raises: Interrupted for a run that was stopped."""
    if not tuned.finished:
        raise Interrupted(
            f"stopped at step {tuned.step} of {tuned.total}, state saved",
            hint="run the same command again to go on from there",
        )
    if run is None:
        return
    from luthier.models.load import read_provenance, save_pretrained
    from luthier.report.html import write_report

    provenance = {
        "verb": verb,
        "chat": True,
        "config": to_mapping(config),
        "parents": [{"model": config.model, "weights": read_provenance(Path(config.model)).get("weights", {})}],
        "data": [{"name": part.name, "sha256": part.sha256} for part in data],
        "env": run.env,
        "metrics": dict(metrics),
    }
    folder = config.out / "model"
    save_pretrained(model, tokenizer, folder, provenance, state_dict=tuned.state_dict)
    shown = {**headline, "updates": f"{tuned.step:,}", "training time": f"{tuned.seconds / 60:.1f} min"}
    run.write_summary({"verb": verb, "headline": shown, "tables": list(tables), "metrics": dict(metrics)})
    report = write_report(run.path)
    for table in tables:
        console.table(**table)
    for name, value in shown.items():
        console.print(f"{name}: {value}")
    console.print(f"model: {folder}")
    console.print(f"report: {report}")
    console.result({**metrics, "model": str(folder), "report": str(report)})
