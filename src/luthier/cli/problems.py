"""`luthier problems`: problems of graded length to test on, and lessons that teach a small model to reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.core.files import atomic_folder, write_jsonl
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.data.problems import Form, Split, draw_program, problem_row
from luthier.reason.lessons import SHORTEST_STRING, Kind, Lessons, strings


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """Make problems of graded length, such as f+5=b;f=17;b?, and conversations that teach how to solve and check them.

    Writes lessons.jsonl (kind messages), test-N.jsonl and held-out-N.jsonl for each length N (kind answer), tokenizer/,
    in which numbers, names and signs with the number after them are tokens of their own, and strings.jsonl (kind text).
    """

    out: Path = Path("runs/problems")
    """Folder for the files."""
    lessons: int = 60_000
    """Conversations."""
    strings: int = 0
    """Rows of strings without sense, each said twice: what a small model learns before any lesson, short ones first."""
    longest_string: int = 16
    """Tokens of the longest string."""
    only: tuple[Kind, ...] = ()
    """Kinds of lessons; empty: all. A small model learns to find first."""
    lengths: tuple[int, int] = (1, 10)
    """Shortest and longest problem in the lessons, in operations."""
    test: int = 400
    """Problems of each length to test on; none of them is in a lesson."""
    test_lengths: tuple[int, ...] = (4, 8, 12, 16, 20)
    """Lengths to test on."""
    modulus: int = 31
    """Values are 0 to modulus - 1."""
    form: Form = "mixed"
    """chain: the variable before and a number; tree: any two earlier variables; mixed: both."""
    shuffled: bool = True
    """Whether the statements of a problem are in no order."""
    unused: int = 6
    """Most statements of a problem that nothing follows from."""
    share: float = 0.03
    """Share of calculations that no lesson and no problem of test-N.jsonl needs, but every one of held-out-N.jsonl."""
    seed: int = 0
    """Another seed gives other problems."""

    def __post_init__(self) -> None:
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ConfigError(f"lengths: got {self.lengths}, expected the shortest and the longest", hint="1 10")
        if min(self.lessons, self.strings, self.test) < 0:
            raise ConfigError("lessons, strings and test must not be negative", hint="0 makes none")
        if self.longest_string < SHORTEST_STRING:
            raise ConfigError(
                f"longest_string: got {self.longest_string}, expected {SHORTEST_STRING} or more", hint="16"
            )
        if not 0 <= self.share < 1:
            raise ConfigError(f"share: got {self.share}, expected 0 to less than 1", hint="0.03 is usual")


def run(config: ProblemsConfig, console: Console) -> None:
    """Write the files."""
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=("out",))) as folder:
        lessons = Lessons(
            count=config.lessons,
            lengths=config.lengths,
            modulus=config.modulus,
            form=config.form,
            shuffled=config.shuffled,
            unused=config.unused,
            share=config.share,
            seed=config.seed,
            only=config.only,
        )
        with console.progress(config.lessons, "lessons") as advance:
            rows = []
            for row in lessons.rows():
                rows.append(row)
                if len(rows) % 1000 == 0:
                    advance(1000)
        written = {name: write_jsonl(folder.path / name, made) for name, made in _files(config, rows).items()}
        if rows:
            _write_tokenizer(folder.path / "tokenizer", rows)
        table: dict[str, Any] = {
            "title": str(config.out),
            "columns": ["file", "rows", "sha256"],
            "rows": [[name, f"{count:,}", digest[:16]] for name, (count, digest) in written.items()],
            "note": "Equal settings give equal files.",
        }
        console.table(**table)
        headline = {name: f"{count:,} rows" for name, (count, _) in written.items()}
        folder.write_summary({"verb": "problems", "headline": headline, "tables": [table]})
        console.result({name: {"rows": count, "sha256": digest} for name, (count, digest) in written.items()})


def _files(config: ProblemsConfig, lessons: Sequence[Mapping[str, Any]]) -> dict[str, Iterable[Mapping[str, Any]]]:
    """The rows of each file; what has none gets no file."""
    files: dict[str, Iterable[Mapping[str, Any]]] = {"lessons.jsonl": lessons} if lessons else {}
    if config.strings:
        files["strings.jsonl"] = strings(config.strings, config.longest_string, config.modulus, config.seed)
    splits: list[Split] = ["test", "held-out"] if config.share else ["test"]
    for split, length in product(splits, config.test_lengths if config.test else ()):
        files[f"{split}-{length}.jsonl"] = _problems(config, split, length)
    return files


def _problems(config: ProblemsConfig, split: Split, length: int) -> Iterator[Mapping[str, Any]]:
    seen: set[str] = set()
    number = 0
    while len(seen) < config.test:
        program = draw_program(
            length,
            derive_seed(config.seed, "test problem", length, number),
            modulus=config.modulus,
            form=config.form,
            split=split,
            shuffled=config.shuffled,
            unused=config.unused,
            share=config.share,
        )
        number += 1
        if program.question not in seen:
            seen.add(program.question)
            yield problem_row(program, f"{length}-{len(seen)}", split)
        if number > 100 * config.test + 100:
            raise ConfigError(f"there are not {config.test} problems of length {length}", hint="ask for fewer")


def _write_tokenizer(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from luthier.data.chat import render
    from luthier.data.tokenizer import SYMBOL_PATTERN, train_bpe

    tokenizer = train_bpe((render(row["messages"]) for row in rows), None, pattern=SYMBOL_PATTERN)
    if not folder.exists():
        with atomic_folder(folder) as partial:
            tokenizer.save_pretrained(partial)
