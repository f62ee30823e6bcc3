"""`luthier word-problems`: the data of a small model's whole life, stories and verified problems."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.core.checks import at_least, between
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError, require
from luthier.core.files import atomic_folder, sha256_file, write_jsonl
from luthier.core.run import RunFolder
from luthier.core.seeds import derive_seed
from luthier.data.contamination import Contamination, RunIndex, check_contamination
from luthier.data.curriculum import chat_row, mixed_texts, preference_row
from luthier.data.stories import draw_stories
from luthier.data.word_problems import Split, WordProblem, WordProblems, duplicates, leaks, problem_row

Rows = list[dict[str, Any]]
TOKENIZER_ROWS = 5000
"""Rows of each training file that the tokenizer is made from."""
TESTS = ("test-questions.jsonl", "test-pairs.jsonl", "preferences-test.jsonl", "stage2-held-out.jsonl")


@dataclass(frozen=True, kw_only=True)
class WordProblemsConfig:
    """Make the data of a small model's whole life: stories, and word problems whose answers a program verifies.

    Writes stage1.jsonl and stage2.jsonl (kind text), chat.jsonl (messages), preferences.jsonl and
    preferences-test.jsonl (preference), prompts.jsonl, test-questions.jsonl and test-pairs.jsonl (answer),
    stage2-held-out.jsonl with its two parts stories-held-out.jsonl and problems-held-out.jsonl (text), and tokenizer/,
    in which every digit is a token.
    """

    out: Path = Path("runs/word-problems")
    """Folder for the files."""
    stage1: int = 8_000_000
    """Characters of text for the first stage, three or four to a token."""
    stage1_maths: float = 0.08
    """Share of these characters that problems take; the rest are stories."""
    stage2: int = 4_000_000
    """Characters of text for the second stage."""
    stage2_maths: float = 0.6
    """Share of these characters that problems take."""
    variants: int = 5
    """Most versions with other numbers that follow each problem of the second stage."""
    chat: int = 15_000
    """Conversations."""
    bare: float = 0.5
    """Share of conversations that are answered without the steps."""
    preferences: int = 2_000
    """Pairs of replies to prefer one of; every other one differs in style, the rest in being right."""
    prompts: int = 4_000
    """Problems to practice on."""
    test: int = 400
    """Problems or pairs in each test file."""
    held_out: int = 200_000
    """Characters of text like the second stage's that no training file has."""
    operands: tuple[int, int] = (2, 9)
    """Least and greatest number in a question."""
    two_steps: float = 0.25
    """Share of problems with two operations."""
    held_questions: float = 0.1
    """Share of questions, and of stories, that are held out."""
    held_pairs: float = 0.1
    """Share of calculations, such as 3 + 4, that no training file has, but every problem of test-pairs.jsonl."""
    vocab_size: int = 512
    """Tokens, of which 256 are the bytes."""
    ngram: int = 13
    """Words in a run that no training file may share with a question of a test file."""
    seed: int = 0
    """Another seed gives other rows."""

    def __post_init__(self) -> None:
        self.problems()
        at_least(self, 1, "stage1", "stage2", "chat", "preferences", "prompts", "test", "held_out")
        between(self, 0, 1, "stage1_maths", "stage2_maths", "bare")
        for name in ("held_questions", "held_pairs"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}: got 0, so there is nothing to test on", hint="0.1 is usual")
        if self.variants < 0 or self.ngram < 1:
            raise ConfigError("variants must be 0 or more and ngram 1 or more", hint="5 and 13 are usual")

    def problems(self) -> WordProblems:
        """Which problems to draw."""
        return WordProblems(
            operands=self.operands,
            two_steps=self.two_steps,
            held_questions=self.held_questions,
            held_pairs=self.held_pairs,
            seed=self.seed,
        )


@dataclass
class _Maker:
    """Draws problems for one file after the other, none of them twice."""

    config: WordProblemsConfig
    seen: set[str] = field(default_factory=set)
    questions: dict[str, list[str]] = field(default_factory=dict)
    """Those of each test file, by its name."""
    avoid: RunIndex | None = None
    """What training must not share with the questions of the test files."""

    def draw(self, purpose: str, split: Split = "train", *, variants: int = 0) -> Iterator[WordProblem]:
        how = self.config.problems()
        for problem in how.draw(purpose, split=split, seen=self.seen, avoid=self.avoid, variants=variants):
            if purpose in TESTS:
                self.questions.setdefault(purpose, []).append(problem.question)
            yield problem

    def stories(self, purpose: str, *, held_out: bool = False) -> Iterator[str]:
        config = self.config
        return draw_stories(purpose, config.seed, held_out=held_out, share=config.held_questions)

    def tests(self) -> dict[str, Rows]:
        """The files that nothing is trained on. They come first, so that training can keep away from them."""
        config = self.config
        made: dict[str, Rows] = {}
        splits: tuple[Split, ...] = ("questions", "pairs")
        for split in splits:
            name = f"test-{split}.jsonl"
            drawn = islice(self.draw(name, split), config.test)
            made[name] = [problem_row(problem, f"{split}-{n}", split) for n, problem in enumerate(drawn, 1)]
        made["preferences-test.jsonl"] = self._preferences("preferences-test.jsonl", config.test, "questions")
        name = "stage2-held-out.jsonl"
        stories = self.stories(name, held_out=True)
        problems = self.draw(name, "questions")
        texts = mixed_texts(problems, stories, config.held_out, config.stage2_maths, derive_seed(config.seed, name))
        made[name] = texts
        made["stories-held-out.jsonl"] = [row for row in texts if row["part"] == "story"]
        made["problems-held-out.jsonl"] = [row for row in texts if row["part"] == "problem"]
        self.avoid = RunIndex(self.questions, config.ngram)
        return made

    def training(self) -> dict[str, Rows]:
        """The files to train on."""
        config = self.config
        made: dict[str, Rows] = {}
        stages = {"stage1.jsonl": (config.stage1, config.stage1_maths, 0)}
        stages["stage2.jsonl"] = (config.stage2, config.stage2_maths, config.variants)
        for name, (characters, maths, variants) in stages.items():
            drawn = self.draw(name, variants=variants)
            made[name] = mixed_texts(drawn, self.stories(name), characters, maths, derive_seed(config.seed, name))
        rng = random.Random(derive_seed(config.seed, "styles"))
        asked = islice(self.draw("chat.jsonl"), config.chat)
        made["chat.jsonl"] = [chat_row(problem, bare=rng.random() < config.bare) for problem in asked]
        made["preferences.jsonl"] = self._preferences("preferences.jsonl", config.preferences, "train")
        prompts = islice(self.draw("prompts.jsonl"), config.prompts)
        made["prompts.jsonl"] = [problem_row(problem, f"prompt-{n}", "train") for n, problem in enumerate(prompts, 1)]
        return made

    def _preferences(self, name: str, count: int, split: Split) -> Rows:
        rng = random.Random(derive_seed(self.config.seed, "mistakes", name))
        return [
            preference_row(problem, "mistake" if number % 2 else "style", rng, self.config.held_pairs)
            for number, problem in enumerate(islice(self.draw(name, split), count))
        ]


def run(config: WordProblemsConfig, console: Console) -> None:
    """Write the files, once it is certain that no training file gives a test away."""
    require("transformers", "torch")
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=("out",))) as folder:
        maker = _Maker(config)
        console.status("drawing the tests")
        tests = maker.tests()
        console.status("drawing what to train on")
        training = maker.training()
        console.status("looking for what is in both")
        found = _check(config, training, tests, maker.questions)
        made = {**training, **tests}
        written = {name: write_jsonl(folder.path / name, rows) for name, rows in made.items()}
        count = _write_tokenizer(folder.path / "tokenizer", config, training)
        tables = [_files_table(config, folder.path, made, written, count), _contamination_table(config, found)]
        for table in tables:
            console.table(**table)
        headline = {name: f"{rows:,} rows" for name, (rows, _) in written.items()}
        contamination = {c.name: {"rows": c.rows, "hits": c.hits, "whole": c.whole} for c in found}
        summary = {"verb": "word-problems", "headline": headline, "tables": tables, "contamination": contamination}
        folder.write_summary(summary)
        files = {name: {"rows": rows, "sha256": digest} for name, (rows, digest) in written.items()}
        console.result({"files": files, "contamination": contamination})


def row_texts(row: Mapping[str, Any]) -> list[str]:
    """What a model reads of a row, question and reply apart."""
    parts: list[str] = []
    for key in ("text", "messages", "prompt", "chosen", "rejected"):
        value = row.get(key, [])
        parts += [value] if isinstance(value, str) else [message["content"] for message in value]
    return parts


def _check(
    config: WordProblemsConfig,
    training: Mapping[str, Rows],
    tests: Mapping[str, Rows],
    questions: Mapping[str, Sequence[str]],
) -> list[Contamination]:
    """What training shares with each test file, all of it zero. Raises: DataError for a leak."""
    texts = [text for rows in training.values() for row in rows for text in row_texts(row)]
    found = check_contamination(texts, RunIndex(questions, config.ngram))
    held = RunIndex({"stories-held-out.jsonl": _texts(tests["stories-held-out.jsonl"])}, 0)
    found += check_contamination((row["text"] for row in training["stage1.jsonl"] + training["stage2.jsonl"]), held)
    for result in found:
        if result.hits or result.whole:
            raise DataError(
                f"{result.hits + result.whole} rows of {result.name} are in a training file: {result.examples[0]!r}",
                hint="choose another seed, or a longer run with --ngram",
            )
    if written := leaks(texts, config.held_pairs):
        raise DataError(f"held-out calculations are in a training file: {written[0]}", hint="choose another seed")
    if again := duplicates([q for rows in questions.values() for q in rows]):
        raise DataError(f"{len(again)} questions are tested twice: {again[0]!r}", hint="choose another seed")
    return found


def _texts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def _write_tokenizer(folder: Path, config: WordProblemsConfig, training: Mapping[str, Rows]) -> Callable[[Rows], int]:
    """Make the tokenizer; returns what counts the tokens of rows of kind text, an end of text for each."""
    from luthier.data.chat import render
    from luthier.data.tokenizer import encode_documents, train_bpe

    texts = _texts(training["stage1.jsonl"][:TOKENIZER_ROWS] + training["stage2.jsonl"][:TOKENIZER_ROWS])
    texts += [render(row["messages"]) for row in training["chat.jsonl"][:TOKENIZER_ROWS]]
    tokenizer = train_bpe(texts, config.vocab_size)
    with atomic_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
    return lambda rows: sum(map(len, encode_documents(tokenizer, _texts(rows))))


def _files_table(
    config: WordProblemsConfig,
    folder: Path,
    made: Mapping[str, Rows],
    written: Mapping[str, tuple[int, str]],
    count: Callable[[Rows], int],
) -> dict[str, Any]:
    rows = []
    for name, (number, digest) in written.items():
        tokens = f"{count(made[name]):,}" if "text" in made[name][0] else ""
        rows.append([name, f"{number:,}", tokens, digest[:16]])
    rows.append(["tokenizer/", f"{config.vocab_size:,}", "", sha256_file(folder / "tokenizer" / "tokenizer.json")[:16]])
    return {
        "title": str(config.out),
        "columns": ["file", "rows", "tokens", "sha256"],
        "rows": rows,
        "note": "Equal settings give equal files. Tokens count an end of text for each row.",
    }


def _contamination_table(config: WordProblemsConfig, found: Sequence[Contamination]) -> dict[str, Any]:
    return {
        "title": "What the training files give away",
        "columns": ["test file", "rows", "runs of words", "whole rows"],
        "rows": [[result.name, f"{result.rows:,}", result.hits, result.whole] for result in found],
        "note": f"Runs are of {config.ngram} words of a question. Stories share phrases, and are compared as a whole.",
    }
