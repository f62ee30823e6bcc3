"""`luthier dpo`: open pairs of replies and a model, hand them to preference optimization, write a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.cli.tuning import finish, open_run, opened
from luthier.cli.tuning_cost import counted, tell_updates
from luthier.core.console import Console
from luthier.core.errors import DataError
from luthier.core.stats import wilson
from luthier.train.tuning_configs import DpoConfig


def dry_run(config: DpoConfig, console: Console) -> None:
    """Print updates and tokens, where the rows are local files."""
    from luthier.data.preferences import preference_rows

    def lengths(tokenizer: Any, rows: Any) -> list[int]:
        pairs, _ = preference_rows(tokenizer, rows, config.max_length, "data")
        return [2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]

    tell_updates("dpo", config, counted(config, ("preference",), lengths, config.held_out), "pairs", console)


def run(config: DpoConfig, console: Console) -> None:
    """Train or resume; under torchrun every rank comes here."""
    from luthier.data.preferences import preference_rows
    from luthier.data.row_source import open_rows, split_rows
    from luthier.learn.parallel import ranks
    from luthier.train.dpo import dpo

    with ranks(config.device) as who, open_run(config, who) as folder:
        source = open_rows(config.data, ("preference",))
        model, tokenizer = opened(config)
        parts = split_rows(source, config.held_out, config.seed)
        (rows, dropped), (held_out, _) = (
            preference_rows(tokenizer, part.rows, config.max_length, source.name) for part in parts
        )
        if not rows:
            raise DataError(f"{source.name}: no pair is left to train on", hint="raise max_length, or lower held_out")
        left_out = f", {dropped:,} left out (no reply within {config.max_length} tokens)" if dropped else ""
        console.status(f"pairs: {len(rows):,} to train on, {len(held_out):,} held out{left_out}")
        tuned, score = dpo(config, model, tokenizer, rows, held_out, who=who, run=folder, console=console)
        finish(
            config,
            "dpo",
            tuned,
            model,
            tokenizer,
            [*parts],
            folder,
            console,
            _headline(config, score),
            metrics=score,
        )
        who.barrier()


def _headline(config: DpoConfig, score: Mapping[str, float]) -> dict[str, str]:
    """What held-out pairs say: moved the right way against the start, and which reply the model itself likes more."""
    if not score:
        return {}
    pairs = int(score["pairs"])
    accuracy = wilson(round(score["pair_accuracy"] * pairs), pairs)
    unit = "nats/token" if config.loss == "norm" else "nats"
    return {
        "held-out pairs moved the right way": f"{accuracy.text()} ({pairs} pairs)",
        "margin": f"{score['margin']:.4f} {unit}",
        "chosen reply is likelier per token": f"{score['preferred']:.3f}, before {score['preferred_before']:.3f}",
        "held-out loss": f"{score['loss']:.4f}",
    }
