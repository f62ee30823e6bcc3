"""`luthier gauge --judge` against a stub server that knows which replies are good."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.gauge import GaugeConfig
from luthier.core.errors import ConfigError
from luthier.core.files import read_json
from luthier.llm.stub_server import Faults, StubServer
from luthier.llm.types import Message

SHOWN = re.compile(r"=== Reply 1 ===\n(.*?)\n\n=== Reply 2 ===\n(.*?)\n\n=== End", re.DOTALL)


def verdict(messages: Sequence[Message], seed: int | None, index: int) -> str:
    """Good replies win; of two that are alike what is shown first does, which the swap evens out."""
    shown = SHOWN.search(messages[-1]["content"])
    assert shown
    good = [reply.startswith("good") for reply in shown.groups()]
    return f"Verdict: {2 if good == [False, True] else 1}"


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer(verdict, faults=Faults(errors=0.05))
    with stub.running():
        yield stub


def collected(folder: Path, replies: Sequence[str], prompts: int = 12) -> Path:
    """A folder as `luthier collect` leaves it: every prompt with the same replies."""
    folder.mkdir(parents=True)
    asked = [[{"role": "user", "content": f"question {number}"}] for number in range(prompts)]
    rows = [{"prompt": prompt, "completion": f"{reply} {n}"} for n, prompt in enumerate(asked) for reply in replies]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """The base, a better set, and one that is alike."""
    kinds = {"seqkd": "bad reply", "gad": "good reply, longer", "other": "bad again"}
    return [collected(tmp_path / name, [reply]) for name, reply in kinds.items()]


def test_sets_of_replies_are_compared_with_the_first_and_paid_for_once(
    luthier: Callable[..., Any], server: StubServer, sets: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--judge", "stub", "--endpoint", server.url, "-o", out)
    planned = json.loads(luthier("gauge", *sets, *options, "--dry-run", "--json").out)
    assert planned["calls, where every verdict can be read at once"] == "48"
    assert planned["calls at most"] == "144"
    assert not out.exists()
    outcome = luthier("gauge", *sets[:2], *options, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["against"] == "seqkd"
    gad = told["sets"]["gad"]
    assert [gad[name] for name in ("win_rate", "wins", "ties", "losses", "unread", "prompts")] == [1, 12, 0, 0, 0, 12]
    assert gad["length"] > gad["other_length"]
    assert gad["length_controlled"] is None  # all of them are longer
    assert server.ledger.answered == 24
    again = json.loads(luthier("gauge", *sets, *options, "--json").out)
    assert server.ledger.answered == 48  # for the third set alone
    assert again["sets"]["gad"] == gad
    other = again["sets"]["other"]
    assert (other["win_rate"], other["ties"], other["consistent"], other["first_shown"]) == (0.5, 12, 0.0, 1.0)
    assert other["length_controlled"] == pytest.approx(0.5)
    figures, grounds = read_json(out / "summary.json")["tables"]
    assert [row[0] for row in figures["rows"]] == ["gad", "other"] == [row[0] for row in grounds["rows"]]
    assert (out / "report.html").is_file()


def test_a_judge_behind_an_endpoint_needs_no_torch(
    luthier_without_torch: Callable[..., Any], server: StubServer, sets: list[Path], tmp_path: Path
) -> None:
    options = ("--judge", "stub", "--endpoint", server.url, "-o", tmp_path / "out", "--json")
    outcome = luthier_without_torch("gauge", *sets[:2], *options)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["sets"]["gad"]["wins"] == 12
    (tmp_path / "teacher.json").write_text(json.dumps({"model": "brackets"}))
    exact = luthier_without_torch("gauge", "model", "--teacher", tmp_path, "-o", tmp_path / "exact")
    assert exact.error == "this needs the package 'torch', which is not installed"


def test_a_spent_budget_gives_no_figures_and_holds_over_all_runs(
    luthier: Callable[..., Any], server: StubServer, sets: list[Path], tmp_path: Path
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("stub: {input: 1.0, output: 2.0}\n")
    command = (
        "gauge",
        *sets[:2],
        "--judge",
        "stub",
        "--endpoint",
        server.url,
        "-o",
        tmp_path / "out",
        "--max-tokens",
        9,
    )
    for _ in range(2):
        outcome = luthier(*command, "--budget", "calls=10")
        assert outcome.code == 130
        assert outcome.error.startswith("the budget of 10 calls is spent")
        assert server.ledger.answered == 10
    assert not (tmp_path / "out" / "summary.json").exists()
    assert luthier(*command, "--budget", "dollars=0.00001", "--prices", prices).code == 130
    assert server.ledger.answered == 10
    told = json.loads(luthier(*command, "--budget", "calls=24", "--json").out)
    assert (told["sets"]["gad"]["wins"], told["usage"]["calls"], server.ledger.answered) == (12, 14, 24)
    assert "has no limit in seconds" in luthier(*command, "--budget", "seconds=1").error


def test_samples_are_compared_one_by_one_and_what_only_one_side_has_is_counted(
    luthier: Callable[..., Any], server: StubServer, tmp_path: Path
) -> None:
    base = collected(tmp_path / "base", ["bad", "good"])
    other = collected(tmp_path / "other", ["good", "bad", "good"], prompts=9)
    options = ("--judge", "stub", "--endpoint", server.url, "-o", tmp_path / "out", "--json")
    told = json.loads(luthier("gauge", base, other / "test.jsonl", *options).out)
    found = told["sets"]["other/test.jsonl"]
    assert [found[name] for name in ("wins", "losses", "prompts", "win_rate")] == [9, 9, 9, 0.5]
    grounds = read_json(tmp_path / "out" / "summary.json")["tables"][1]
    assert grounds["rows"][0][1:4] == ["18", "3", "0"]
    one = json.loads(luthier("gauge", base, other / "test.jsonl", *options, "--samples", 1).out)
    assert one["sets"]["other/test.jsonl"]["wins"] == 9
    assert one["sets"]["other/test.jsonl"]["losses"] == 0


def test_what_is_missing_is_told(luthier: Callable[..., Any], sets: list[Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text(json.dumps({"prompt": "another", "completion": "good"}) + "\n")
    judge = ("--judge", "stub", "-o", tmp_path / "out")
    assert "have no prompt in common" in luthier("gauge", sets[0], elsewhere, *judge).error
    assert "validation.jsonl: missing" in luthier("gauge", *sets, *judge, "--split", "validation").error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either teacher"),
        ({"teacher": Path("t"), "judge": "j"}, "not both"),
        ({"judge": "j", "models": ("one",)}, "two or more"),
        ({"judge": "j", "temperatures": (0.5,)}, "temperatures: there is none"),
        ({"teacher": Path("t"), "budget": ("calls=1",)}, "budget: there is none without a judge"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GaugeConfig(**{"models": ("one", "two"), **settings})
