"""`luthier solve` and `luthier eval --tasks` against a simulated model behind a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.eval_tasks import _failures
from luthier.llm.stub_server import Faults, StubServer
from luthier.reason.simulation import Chain, Habits, SimulatedSolver

CHAIN = Chain.draw(5, 1)


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    """A server of a solver that errs, which itself fails now and then, in a thread of its own."""
    stub = StubServer(SimulatedSolver(Habits(error=0.15)).reply, faults=Faults(errors=0.02))
    with stub.running():
        yield stub


def test_a_question_is_answered_and_its_steps_are_shown(
    luthier: Callable[..., Any], server: StubServer, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    outcome = luthier("solve", CHAIN.question, "--model", "stub", "--endpoint", server.url, "--trace", trace)
    assert outcome.code == 0, outcome.err
    assert f"answer: {CHAIN.answer}" in outcome.out
    assert "5. ██████████ What is v5?" in outcome.err
    assert "5 of 5 steps confirmed" in outcome.err
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert events[0]["kind"] == "problem"


def test_the_machine_readable_result(luthier: Callable[..., Any], server: StubServer) -> None:
    outcome = luthier(
        "solve", CHAIN.question, "--model", "stub", "--endpoint", server.url, "--method", "maj@3", "--json"
    )
    result = json.loads(outcome.out)
    assert result["answer"] == CHAIN.answer
    assert result["calls"] == 1


def test_a_budget_ends_the_work(luthier: Callable[..., Any], server: StubServer) -> None:
    where = ("--model", "stub", "--endpoint", server.url)
    outcome = luthier("solve", CHAIN.question, *where, "--budget", "calls=2", "tokens=9999", "--json")
    result = json.loads(outcome.out)
    assert (result["stop"], result["calls"]) == ("budget", 2)
    assert luthier("solve", "Q", *where, "--budget", "calls").error.startswith("budget: got 'calls'")
    assert luthier("solve", "Q", *where, "--method", "srs").error.startswith("'srs': no such method")
    assert luthier("solve", " ", *where).error.startswith("there is nothing to solve")


def test_votes_are_shown_and_dollars_need_prices(luthier: Callable[..., Any], server: StubServer) -> None:
    where = ("--model", "stub", "--endpoint", server.url)
    outcome = luthier("solve", CHAIN.question, *where, "--method", "maj@3")
    assert f"votes: {CHAIN.answer} ×" in outcome.err
    assert luthier("solve", "Q", *where, "--budget", "dollars=1").error == "budget: dollars need prices"


def test_a_local_folder_is_a_model_too(luthier: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    from luthier.data.tokenizer import train_bpe
    from luthier.models.initialization import initialize
    from luthier.models.instella import InstellaForCausalLM
    from luthier.models.instella_config import sized_config
    from luthier.models.load import save_pretrained

    tokenizer = train_bpe(["What is 2 + 3? It is 5. What is 4 + 4? It is 8."] * 3, 262)
    config = sized_config("nano", tokenizer, vocab_size=262, max_position_embeddings=1024)
    network = InstellaForCausalLM._from_config(config, dtype=torch.float32)
    initialize(network, 1)
    save_pretrained(network.eval(), tokenizer, tmp_path / "model", {"verb": "test"})
    where = ("--model", tmp_path / "model", "--device", "cpu", "--json")
    outcome = luthier("solve", "What is 2 + 3?", *where, "--method", "maj@2:prompts=short,max_tokens=4")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["calls"], result["stop"]) == (1, "no answer")  # it was never trained
    assert 0 < result["completion_tokens"] <= 8


def test_why_calls_failed_is_said() -> None:
    failed = [{"status": "failed", "error": text} for text in ("server is down", "timed out")]
    rows = {"sums": {"cot": [{"status": "correct"}, *failed], "ssr": [{"status": "wrong"}]}}
    assert list(_failures(rows)) == ["sums, cot: 2 failed, the first with: server is down"]


def test_no_torch_is_needed_with_an_endpoint(luthier_without_torch: Callable[..., Any], server: StubServer) -> None:
    outcome = luthier_without_torch("solve", CHAIN.question, "--model", "stub", "--endpoint", server.url, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["answer"] == CHAIN.answer


def test_methods_are_compared_on_a_task_and_a_second_run_is_free(
    luthier: Callable[..., Any], server: StubServer, tmp_path: Path
) -> None:
    problems = tmp_path / "chains.jsonl"
    chains = [(length, Chain.draw(length, n)) for length in (3, 8) for n in range(8)]
    rows = [{"prompt": c.question, "answer": c.answer, "metadata": {"length": length}} for length, c in chains]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("eval", "stub", "--endpoint", server.url, "--tasks", problems, "--out", tmp_path / "run")
    methods = ("--method", "cot", "ssr", "--equal-to", "ssr", "--by", "length", "--traces")
    outcome = luthier(*command, *methods)
    assert outcome.code == 0, outcome.err
    assert "pair by pair" in outcome.out
    asked = server.ledger.requests
    again = luthier(*command, *methods, "--json")
    assert server.ledger.requests == asked
    numbers = json.loads(again.out)["tasks"]["chains"]
    assert numbers["ssr"]["accuracy"]["value"] > numbers["cot"]["accuracy"]["value"]
    vote = next(name for name in numbers if name.startswith("maj@"))
    assert numbers[vote]["completion_tokens"] == pytest.approx(numbers["ssr"]["completion_tokens"], rel=0.3)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "run" / "traces").iterdir()) == ["chains"] * len(
        list((tmp_path / "run" / "traces").iterdir())
    )


def test_tasks_need_a_place_for_their_rows(luthier: Callable[..., Any]) -> None:
    assert luthier("eval", "m", "--tasks", "mini-sudoku").error == "solving tasks needs a run folder"
