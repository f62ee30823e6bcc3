from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError
from luthier.llm import ScriptedBackend
from luthier.llm.types import Score
from luthier.tasks.likelihood import Item, LikelihoodTask, Option
from luthier.tasks.likelihood_runner import score_task
from luthier.tasks.runner import Row

ITEMS = [
    Item(id=str(n), options=(Option(f"{n} is", " odd"), Option(f"{n} is", " even")), label=1 - n % 2) for n in range(6)
]
TASK = LikelihoodTask("sums", "choice", ITEMS)


class Knows(ScriptedBackend):
    """Knows odd from even; cannot read the contexts in `down`."""

    def __init__(self, down: tuple[str, ...] = ()) -> None:
        super().__init__([], scores=self.likely)
        self.down = down

    async def score(self, prompt: str, completion: str) -> Score:
        if prompt in self.down:
            raise ConfigError("600 tokens exceed the context of 512 tokens", hint="shorten the prompt")
        return await super().score(prompt, completion)

    def likely(self, prompt: str, completion: str) -> float:
        if not prompt:
            return -3.0
        return -1.0 if (int(prompt[0]) % 2 == 1) == (completion == " odd") else -2.0


def score(backend: Any, path: Path, task: LikelihoodTask = TASK, **options: Any) -> list[Row]:
    return asyncio.run(score_task(task, backend, path, **options))


def test_rows_are_in_the_order_of_the_items(tmp_path: Path) -> None:
    rows = score(Knows(), tmp_path / "a.jsonl", at_once=3)
    assert [row["problem"] for row in rows] == list("012345")
    assert [row["status"] for row in rows] == ["correct"] * 6
    assert rows[2]["logprobs"] == [-2.0, -1.0]
    assert (rows[2]["bytes"], rows[2]["tokens"], rows[2]["gold"]) == ([3, 4], [1, 1], 1)


def test_a_second_run_scores_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = score(Knows(), path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    backend = Knows()
    rows = score(backend, path)
    assert len({prompt for prompt, _ in backend.scored}) == 1
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in first]
    assert len(path.read_text().splitlines()) == 6


def test_what_cannot_be_read_is_counted_wrong_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = score(Knows(("4 is",)), path)[4]
    assert (row["status"], row["error"]) == ("failed", "600 tokens exceed the context of 512 tokens")
    backend = Knows()
    assert [row["status"] for row in score(backend, path)] == ["correct"] * 6
    assert {prompt for prompt, _ in backend.scored} == {"4 is"}


def test_other_weights_other_texts_and_other_measures_are_scored_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    score(Knows(), path, identity="m@1")
    same, weights, examples, alone = Knows(), Knows(), Knows(), Knows()
    score(same, path, identity="m@1")
    assert same.scored == []
    score(weights, path, identity="m@2")
    assert len(weights.scored) == 12
    score(examples, path, identity="m@2", method="likelihood, 5 shots")
    assert len(examples.scored) == 12
    rows = score(alone, path, identity="m@2", unconditional=True)
    assert rows[0]["unconditional"] == [-3.0, -3.0]
    changed, backend = LikelihoodTask("sums", "choice", [Item(id="0", options=(Option("8 is", " odd"),) * 2)]), Knows()
    assert score(backend, path, changed, identity="m@2")[0]["status"] == "wrong"  # a tie
    assert backend.scored == [("8 is", " odd")]  # equal options are scored once


def test_a_backend_that_does_not_tell_its_choice_cannot_do_targets(tmp_path: Path) -> None:
    task = LikelihoodTask("words", "target", [Item(id="0", options=(Option("1 is", " odd"),))])
    (row,) = score(Knows(), tmp_path / "a.jsonl", task)
    assert row["status"] == "failed"
    assert "does not tell which tokens it would write" in row["error"]
    assert json.loads((tmp_path / "a.jsonl").read_text())["task"] == "words"
