"""`luthier eval`: how well a model predicts a text, which text it finds likelier, or what it solves at what price."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from luthier.core.console import Console
from luthier.core.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure how many bits a model needs for a text; with --tasks, what it solves, or finds the likeliest."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id."""
    data: str = "python-prose"
    """Text: a file, a folder, a hub id, python-prose, or token shards."""
    given: str = ""
    """Text that the compressors may look at first, as the model did in training: a fair, conditional comparison."""
    context: int = 0
    """Tokens that the model sees at most; 0: its own limit, up to 2048."""
    max_bytes: int = 0
    """Score only the first whole documents up to this size; 0: all."""
    batch_size: int = 8
    """Windows that are scored at once."""
    compressors: bool = True
    """Also compress the text with gzip, bzip2, xz and zstd."""
    tasks: tuple[str, ...] = ()
    """What to measure instead. Problems to solve: mini-sudoku, zebra, gsm8k:FILE, math:FILE, aime:FILE, or FILE
    (prompt, answer). Texts to score: cloze, word-order, last-word, one of these with a corpus (cloze:book.txt), or
    FILE (context, choices, label; context, target; good, bad). Facts to find: needle:FILE, as long-data makes."""
    method: tuple[str, ...] = ("cot",)
    """How to solve them, one or more: cot, maj@16, ssr, ssr-plan:rounds=5, ssr-lin:preset=paper, ..."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server that has the model; by default it runs in this process."""
    role: tuple[str, ...] = ()
    """Other models for some calls: judge=NAME@URL; the roles are solve, decompose, step, judge, refine and plan."""
    prices: Path | None = None
    """YAML file with dollars per million tokens, by model: NAME: {input: 0.05, output: 0.2}."""
    equal_to: str = ""
    """Add a majority vote that generates as many tokens as this method does."""
    shots: int = 0
    """Solved examples in front of each context, for texts to score."""
    shots_from: Path | None = None
    """File of items that the examples are drawn from; by default the task's other items."""
    unconditional: bool = False
    """Also measure how much likelier the context makes each choice, which takes twice the work."""
    against: Path | None = None
    """Run folder of an earlier evaluation of another model on the same tasks: may the difference be chance?"""
    repeats: int = 1
    """Times that each problem is solved; above 1 the table has pass@k and maj@k."""
    limit: int = 0
    """Solve only the first problems of each task; 0: all."""
    by: str = ""
    """Also a row for each value of this field of the problems' metadata, such as length; several: length,depth."""
    at_once: int = 16
    """Problems in work at the same time."""
    seed: int = 0
    """Equal seeds give equal requests."""
    traces: bool = False
    """Record every call in the run folder."""
    device: str = "auto"
    """cpu, cuda or auto."""
    out: Path | None = None
    """Run folder for the result."""

    def __post_init__(self) -> None:
        if self.context < 0 or self.batch_size < 1 or self.max_bytes < 0:
            raise ConfigError(
                "context and max_bytes must not be negative, batch_size at least 1", hint="leave them at their defaults"
            )
        if self.repeats < 1 or self.limit < 0 or self.at_once < 1:
            raise ConfigError("repeats and at_once must be at least 1, limit at least 0", hint="change them")
        if self.tasks and self.out is None:
            raise ConfigError("solving tasks needs a run folder", hint="give --out FOLDER: it also resumes there")
        only_tasks = ("endpoint", "equal_to", "shots", "unconditional", "against")
        if not self.tasks and (given := [name for name in only_tasks if getattr(self, name)]):
            raise ConfigError(f"{', '.join(given)}: only tasks take that", hint="give --tasks")
        if self.shots < 0 or (self.shots_from is not None and not self.shots):
            raise ConfigError("shots must be a number above 0 where shots_from is given", hint="for example --shots 5")
        local = None if self.endpoint else Path(self.model).resolve()
        if local is not None and self.out is not None and self.out.resolve().is_relative_to(local):
            raise ConfigError(
                f"out: {self.out} lies in the model's folder, which is never written to", hint="choose another --out"
            )


def run(config: EvalConfig, console: Console) -> None:
    """Score the text, or measure the tasks."""
    if any(name.startswith("needle:") for name in config.tasks):
        from luthier.cli import eval_needles

        eval_needles.run(config, console)
        return
    if config.tasks:
        from luthier.cli import eval_tasks

        eval_tasks.run(config, console)
        return
    require("torch", "torch")
    require("transformers", "torch")
    from luthier.cli import eval_text

    eval_text.run(config, console)
