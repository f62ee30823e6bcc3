"""`luthier pretrain`: open the corpora and the start, hand tokens and a config to training, write a model folder."""

from __future__ import annotations

from functools import partial

from luthier.cli.starts import outline
from luthier.cli.training import run_training, tell_cost
from luthier.core.console import Console
from luthier.train.config import PretrainConfig


def dry_run(config: PretrainConfig, console: Console) -> None:
    """Print what the run would cost."""
    start = outline(config.start) if config.start else None
    extra = {"start": config.start} if config.start else {}
    name = "pretrain" if config.size == "auto" else f"pretrain {config.size}"
    tell_cost(name, config, console, size=start.dimensions if start else None, extra=extra)


def run(config: PretrainConfig, console: Console) -> None:
    """Train or resume; under torchrun every rank comes here."""
    from luthier.train.pretrain import pretrain
    from luthier.train.start import ModelStart, check_shape, check_use

    def check(start: ModelStart) -> None:
        check_shape(config, start)
        check_use(config, start)

    run_training("pretrain", config, config, console, partial(pretrain, config), check=check)
