from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_problems_are_written_and_a_model_learns_from_the_lessons(luthier: Callable[..., Any], tmp_path: Path) -> None:
    command = ("problems", "--lessons", 60, "--test", 3, "--test-lengths", 2, 5, "--lengths", 1, 3)
    command += ("--strings", 7, "--longest-string", 4)
    outcome = luthier(*command, "--out", tmp_path / "p", "--json")
    assert outcome.code == 0, outcome.err
    files = json.loads(outcome.out)
    assert {name: file["rows"] for name, file in files.items()} == {
        "lessons.jsonl": 60,
        "strings.jsonl": 7,
        "test-2.jsonl": 3,
        "test-5.jsonl": 3,
        "held-out-2.jsonl": 3,
        "held-out-5.jsonl": 3,
    }
    again = json.loads(luthier(*command, "--out", tmp_path / "q", "--json").out)
    assert again == files
    model = ("--size", "nano", "--steps", 4, "--warmup-steps", 1, "--vocab-size", 258, "--sequence-length", 256)
    quick = ("--eval-every", 0, "--sample-prompts", "--batch-size", 2, "--micro-batch-size", 2, "--compile", "off")
    lessons = tmp_path / "p" / "lessons.jsonl"
    trained = luthier("pretrain", "--data", lessons, "--out", tmp_path / "m", *model, *quick)
    assert trained.code == 0, trained.err
    said = luthier("chat", tmp_path / "m" / "model", "--prompt", "a=1;b=a+1;b?\nSolve.", "--max-tokens", 2, "--json")
    assert json.loads(said.out)["raw"] is False  # it learned the chat format
    scored = luthier("eval", tmp_path / "m" / "model", "--data", lessons, "--out", tmp_path / "s")
    assert "conversations, expected text" in scored.error
    tests = [tmp_path / "p" / f"test-{length}.jsonl" for length in (2, 5)]
    tasks = ("--tasks", *tests, "--method", "cot:prompts=short,max_tokens=20")
    solved = luthier("eval", tmp_path / "m" / "model", *tasks, "--out", tmp_path / "e", "--by", "length")
    assert solved.code == 0, solved.err
    assert "test-5 by length" in solved.out


def test_no_file_is_written_for_what_is_not_asked_for(luthier: Callable[..., Any], tmp_path: Path) -> None:
    made = luthier("problems", "--lessons", 0, "--test", 0, "--strings", 5, "--out", tmp_path / "p", "--json")
    assert list(json.loads(made.out)) == ["strings.jsonl"]
    assert sorted(path.name for path in (tmp_path / "p").glob("*.jsonl")) == ["strings.jsonl"]


def test_bad_settings_are_named(luthier: Callable[..., Any], tmp_path: Path) -> None:
    assert luthier("problems", "--lengths", 5, 2, "--out", tmp_path).error.startswith("lengths: got (5, 2)")
    assert luthier("problems", "--longest-string", 1, "--out", tmp_path).error.startswith("longest_string: got 1")
