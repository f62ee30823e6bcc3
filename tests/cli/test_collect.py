"""`luthier collect` against a stub server and the bracket teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.collect import CollectConfig, check_complete, open_brackets
from luthier.core.errors import ConfigError, EndpointError
from luthier.core.files import read_json, read_jsonl
from luthier.data.formats import read_rows
from luthier.distill.teacher import Collected
from luthier.llm.stub_server import Faults, StubServer


@pytest.fixture
def server() -> Iterator[StubServer]:
    """A server whose every reply names its question."""
    stub = StubServer(lambda messages, seed, index: f"{messages[-1]['content']} {index}", faults=Faults(errors=0.05))
    with stub.running():
        yield stub


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 prompts, one of which is there twice."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"question {number}"} for number in [*range(40), 7]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_collection_from_a_server(
    luthier: Callable[..., Any], server: StubServer, prompts: Path, tmp_path: Path
) -> None:
    out, prices = tmp_path / "out", tmp_path / "prices.yaml"
    prices.write_text("stub: {input: 1.0, output: 2.0}\n")
    command = ("collect", prompts, "--model", "stub", "--endpoint", server.url, "-o", out, "--prices", prices)
    shares = ("--validation", 0.2, "--test", 0.2)
    dry = json.loads(luthier(*command, "--samples", 2, "--dry-run", "--json").out)
    assert (dry["prompts"], dry["calls at most"], dry["generated tokens at most"]) == (40, 80, 80 * 1536)
    assert not out.exists()
    outcome = luthier(*command, *shares)
    assert outcome.code == 0, outcome.err
    assert "terms of use" in outcome.err
    made = read_json(out / "teacher.json")
    assert made["counts"] == {"kept": 40, "dropped": {}, "failed": 0, "left": 0, "stopped": ""}
    assert made["prompts"]["repeated"] == 1
    assert made["usage"] == {
        "prompt_tokens": server.ledger.prompt_tokens,
        "completion_tokens": server.ledger.completion_tokens,
        "reasoning_tokens": 0,
        "calls": 40,
        "unreported": 0,
    }
    assert made["dollars"] == pytest.approx((80 + 2 * 120) / 1e6)
    assert made["dollars"] < dry["dollars at most"]
    splits = {name: list(read_rows(out / f"{name}.jsonl", "completion")) for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {n: s["rows"] for n, s in made["splits"].items()}
    assert sum(map(len, splits.values())) == 40
    more = luthier(*command, *shares, "--samples", 2, "--json")
    assert json.loads(more.out)["counts"]["kept"] == 80
    assert server.ledger.answered == 80
    assert luthier(*command, *shares, "--temperature", 0.5).error.startswith(f"{out} holds a run with another config")


def test_a_spent_budget_stops_and_says_so(
    luthier: Callable[..., Any], server: StubServer, prompts: Path, tmp_path: Path
) -> None:
    command = ("collect", prompts, "--model", "stub", "--endpoint", server.url, "-o", tmp_path / "out")
    outcome = luthier(*command, "--budget", "calls=10")
    assert outcome.code == 130
    assert outcome.error == "the budget of 10 calls is spent: 30 of 40 replies are missing"
    assert server.ledger.answered == 10
    assert sum(1 for _ in read_rows(tmp_path / "out" / "replies.jsonl")) == 10
    assert luthier(*command).code == 0
    assert server.ledger.answered == 40
    assert luthier(*command, "--budget", "dollars=1").error.startswith("the price of 'stub' is unknown")
    assert luthier(*command, "--budget", "seconds=1").error.startswith("budget: collecting has no limit in seconds")


def test_replies_that_are_none_are_dropped_and_a_server_that_is_down_is_an_error(
    luthier: Callable[..., Any], prompts: Path, tmp_path: Path
) -> None:
    refusing = StubServer(lambda messages, seed, index: "" if "3" in messages[-1]["content"] else "fine")
    with refusing.running():
        fine = luthier("collect", prompts, "--model", "m", "--endpoint", refusing.url, "-o", tmp_path / "a")
        assert fine.code == 0, fine.err
        assert "dropped: empty" in fine.out
    command = ("collect", prompts, "--model", "m", "--endpoint", refusing.url, "-o", tmp_path / "b")
    outcome = luthier(*command)
    assert outcome.code == 2
    assert outcome.error.startswith("40 of 40 replies are missing, 35 because calls failed: http://")
    assert not (tmp_path / "b" / "train.jsonl").exists()


def test_the_bracket_teacher_and_a_student_make_preferences(luthier: Callable[..., Any], tmp_path: Path) -> None:
    brackets = ("collect", "brackets:60", "--model", "brackets:types=2,max_tokens=10", "--samples", 2)
    assert luthier(*brackets, "--seed", 1, "-o", tmp_path / "teacher").code == 0
    student = luthier(*brackets, "--seed", 2, "-o", tmp_path / "student", "--chosen", tmp_path / "teacher", "--json")
    assert student.code == 0, student.err
    rows = list(read_rows(tmp_path / "student" / "preferences-train.jsonl", "preference"))
    assert len(rows) == json.loads(student.out)["preferences"]["train"]["rows"] > 20
    teacher = open_brackets("brackets:types=2,max_tokens=10")
    assert all(teacher.is_valid(row["prompt"], row["chosen"]) and row["chosen"] != row["rejected"] for row in rows)
    again = luthier(*brackets, "--seed", 1, "-o", tmp_path / "again")
    assert again.code == 0
    same = [sorted(map(str, read_jsonl(tmp_path / name / "train.jsonl"))) for name in ("teacher", "again")]
    assert same[0] == same[1]


def test_a_cache_is_paid_for_once(
    luthier: Callable[..., Any], server: StubServer, prompts: Path, tmp_path: Path
) -> None:
    command = ("collect", prompts, "--model", "stub", "--endpoint", server.url, "--cache", tmp_path / "c.sqlite")
    for name in ("a", "b"):
        assert luthier(*command, "-o", tmp_path / name).code == 0
    assert server.ledger.answered == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.jsonl",), "absent.jsonl: no such file"),
        (("brackets:many", "--model", "brackets"), "prompts: got 'brackets:many'"),
        (("brackets:9", "--model", "x"), "model: got 'x' for prompts of the teacher brackets"),
        (("brackets:9", "--model", "brackets:depth=2"), "brackets:depth: no such setting"),
        (("brackets:9999", "--model", "brackets"), "prompts: got 9999, expected 1 to 512"),
        (("brackets:9", "--model", "brackets", "--failed", "2"), "failed: got 2.0"),
        (("brackets:9", "--model", "brackets", "--validation", "0.9", "--test", "0.9"), "shares: got"),
    ],
)
def test_mistakes_are_named(
    luthier: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    model = () if "--model" in arguments else ("--model", "m")
    outcome = luthier("collect", *arguments, *model, "-o", tmp_path / "out")
    assert message in outcome.error


def test_a_text_file_has_a_prompt_on_each_line(luthier: Callable[..., Any], server: StubServer, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two words\n")
    command = ("collect", tmp_path / "p.txt", "--model", "stub", "--endpoint", server.url, "-o", tmp_path / "o")
    assert luthier(*command, "--system", "Be short.").code == 0
    rows = read_jsonl(tmp_path / "o" / "replies.jsonl")
    assert sorted(row["completion"][0]["content"] for row in rows) == [" two words 0", "one 0"]
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be short."}
    (tmp_path / "p.doc").write_text("x")
    assert "prompts are read from" in luthier("collect", tmp_path / "p.doc", "--model", "m").error


def test_a_few_failures_can_be_allowed(tmp_path: Path) -> None:
    collected = Collected(rows=[{}] * 9, failed=1, errors=[EndpointError("refused", hint="ask otherwise")])
    check_complete(CollectConfig(prompts="p", model="m", failed=0.1), collected)
    with pytest.raises(EndpointError, match="1 of 10 replies are missing, 1 because calls failed: refused"):
        check_complete(CollectConfig(prompts="p", model="m", failed=0.05), collected)


def test_names_of_bracket_teachers() -> None:
    assert open_brackets("brackets").max_tokens == 30
    with pytest.raises(ConfigError, match="max_tokens is 3"):
        open_brackets("brackets:max_tokens=3")
