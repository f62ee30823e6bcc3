"""`luthier extend`: train an Instella to use a longer context, with a larger RoPE base and document masks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from luthier.cli.starts import Outline, outline
from luthier.cli.training import run_training, tell_cost
from luthier.core.console import Console
from luthier.models.arithmetic import Dimensions, size_table
from luthier.train.extend_config import ExtendConfig, new_theta

if TYPE_CHECKING:
    from luthier.train.pretrain import Pretrained
    from luthier.train.start import ModelStart

# What a dry run assumes of a start that is not on this machine (yet): the paper's model.
PAPER = Outline(
    dimensions=Dimensions(vocab_size=50304, **size_table("3b")),  # type: ignore[arg-type]
    theta=10_000.0,
    length=4096,
)


def dry_run(config: ExtendConfig, console: Console) -> None:
    """Print the RoPE base, the tokens and what they would cost."""
    found = outline(config.start)
    start = found or PAPER
    theta = new_theta(config, start.theta, start.length)
    what = "Instella" if found else "not on this machine: figures for the paper's 3B"
    extra = {
        "start": f"{config.start} ({what})",
        "RoPE base": f"{start.theta:,.0f} → {theta:,.0f}",
        "context": f"{start.length:,} → {max(config.sequence_length, start.length):,} tokens",
    }
    tell_cost("extend", config.as_pretraining(), console, size=start.dimensions, extra=extra)


def run(config: ExtendConfig, console: Console) -> None:
    """Train or resume; under torchrun every rank comes here."""
    from luthier.train.extend import extend, lengthened
    from luthier.train.start import check_use

    def check(start: ModelStart) -> None:
        check_use(config.as_pretraining(), lengthened(start, config))

    run_training(
        "extend",
        config,
        config.as_pretraining(),
        console,
        partial(extend, config),
        check=check,
        headline=_headline,
    )


def _headline(outcome: Pretrained) -> dict[str, str]:
    described = outcome.model.config
    return {"context": f"{described.max_position_embeddings:,} tokens, RoPE base {described.rope['rope_theta']:,.0f}"}
