"""`luthier sft`: open rows and model, hand them to fine-tuning, and write a model folder and a report."""

from __future__ import annotations

from typing import Any

from luthier.cli.tuning import finish, open_run, opened
from luthier.cli.tuning_cost import counted, tell_updates
from luthier.core.console import Console
from luthier.core.errors import DataError
from luthier.train.tuning_configs import SftConfig


def dry_run(config: SftConfig, console: Console) -> None:
    """Print updates and tokens, where the rows are local files."""
    from luthier.data.replies import learned_rows

    def lengths(tokenizer: Any, rows: Any) -> list[int]:
        kept, _ = learned_rows(tokenizer, rows, config.max_length, "data")
        return [len(row["input_ids"]) for row in kept]

    found = counted(config, ("messages", "completion"), lengths, config.held_out)
    tell_updates("sft", config, found, "rows", console)


def run(config: SftConfig, console: Console) -> None:
    """Fine-tune or resume; under torchrun every rank comes here."""
    from luthier.data.replies import learned_rows
    from luthier.data.row_source import open_rows, split_rows
    from luthier.learn.parallel import ranks
    from luthier.train.sft import sft

    with ranks(config.device) as who, open_run(config, who) as folder:
        source = open_rows(config.data, ("messages", "completion"))
        model, tokenizer = opened(config)
        parts = split_rows(source, config.held_out, config.seed)
        (rows, dropped), (held_out, _) = (
            learned_rows(tokenizer, part.rows, config.max_length, source.name) for part in parts
        )
        if not rows:
            raise DataError(f"{source.name}: no row has a reply to learn", hint="raise max_length, or check the rows")
        left_out = f", {dropped:,} left out (no reply within {config.max_length} tokens)" if dropped else ""
        console.status(f"rows: {len(rows):,} to train on, {len(held_out):,} held out{left_out}")
        tuned, score = sft(config, model, tokenizer, rows, held_out, who=who, run=folder, console=console)
        headline = {"held-out loss": f"{score['loss']:.3f} nats/token ({score['rows']} rows)"} if score else {}
        finish(config, "sft", tuned, model, tokenizer, [*parts], folder, console, headline, metrics=score)
        who.barrier()
