"""`luthier mathrl`: open questions and a model, hand them to reinforcement learning, and write a model folder."""

from __future__ import annotations

import importlib.util
from typing import Any

from luthier.cli.tuning import finish, open_run, opened
from luthier.cli.tuning_cost import counted, tell_updates
from luthier.core.console import Console
from luthier.core.errors import DataError, MissingExtra
from luthier.train.tuning_configs import MathRLConfig

KINDS = ("answer",)


def dry_run(config: MathRLConfig, console: Console) -> None:
    """Print updates and the most tokens that are sampled, where the rows are local files."""
    from luthier.train.mathrl import questions_of

    def lengths(tokenizer: Any, rows: Any) -> list[int]:
        kept, _ = questions_of(tokenizer, rows, config.suffix, config.max_lengths[0], "data")
        return [len(question.ids) for question in kept]

    tell_updates("mathrl", config, counted(config, KINDS, lengths, 0.0), "questions", console)
    console.print(f"  {config.generations} replies of at most {config.max_lengths[1]:,} tokens to each question")


def run(config: MathRLConfig, console: Console) -> None:
    """Train or resume; under torchrun every rank comes here."""
    from luthier.data.row_source import open_rows, split_rows
    from luthier.learn.parallel import ranks
    from luthier.tasks.grading import Grader
    from luthier.train.mathrl import mathrl, questions_of

    if config.vllm != "off" and importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm: it is not installed", hint="pip install vllm, or leave vllm off")
    with ranks(config.device) as who, open_run(config, who) as folder:
        source = open_rows(config.data, KINDS)
        model, tokenizer = opened(config)
        parts = split_rows(source, min(1.0, config.held_out / len(source.rows)), config.seed)
        (questions, dropped), (held_out, _) = (
            questions_of(tokenizer, part.rows, config.suffix, config.max_lengths[0], source.name) for part in parts
        )
        if not questions:
            raise DataError(f"{source.name}: no question is left", hint="raise max_lengths, or lower held_out")
        left_out = f", {dropped:,} left out (more than {config.max_lengths[0]} tokens)" if dropped else ""
        console.status(f"questions: {len(questions):,} to train on, {len(held_out):,} held out{left_out}")
        tuned, figures, tables = mathrl(
            config, model, tokenizer, questions, held_out, grader=Grader(), who=who, run=folder, console=console
        )
        headline = {
            f"{name} on {len(held_out)} held-out questions": f"{figures[f'{name} after']:.3f}, "
            f"before {figures[f'{name} before']:.3f}"
            for name in ("pass@1", f"pass@{config.generations}", "greedy")
            if f"{name} after" in figures
        }
        finish(
            config,
            "mathrl",
            tuned,
            model,
            tokenizer,
            [*parts],
            folder,
            console,
            headline,
            metrics=figures,
            tables=[table for table in tables if table],
        )
        who.barrier()
