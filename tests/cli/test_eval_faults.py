"""`luthier eval --tasks` on a bad server, in a process that is killed: the result is that of a quiet day."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.llm.stub_server import Faults, StubServer
from luthier.reason.simulation import Chain, Habits, SimulatedSolver

METHODS = ("cot", "ssr")
BAD_DAY = Faults(limited=0.2, retry_after=0.01, one_choice=True)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "chains.jsonl"
    chains = [Chain.draw(4, number) for number in range(12)]
    path.write_text("".join(json.dumps({"prompt": c.question, "answer": c.answer}) + "\n" for c in chains))
    return path


def solver() -> SimulatedSolver:
    return SimulatedSolver(Habits(error=0.2))


def command(problems: Path, url: str, out: Path) -> list[str]:
    where = ["eval", "stub", "--endpoint", url, "--tasks", str(problems), "--out", str(out), "--json"]
    return [*where, "--method", *METHODS, "--at-once", "4"]


def verdicts(out: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    found = {(row["method"], row["problem"]): (row["status"], row["answer"], row["completion_tokens"]) for row in rows}
    assert len(found) == len(rows) == 12 * len(METHODS)
    return found


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    luthier: Callable[..., Any], problems: Path, tmp_path: Path
) -> None:
    with StubServer(solver().reply, faults=Faults(one_choice=True)).running() as quiet:
        whole = luthier(*command(problems, quiet.url, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    bad = StubServer(solver().reply, latency=0.02, faults=BAD_DAY)
    with bad.running():
        arguments = [sys.executable, "-m", "luthier", *command(problems, bad.url, tmp_path / "killed")]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answers, deadline = tmp_path / "killed" / "answers.jsonl", time.monotonic() + 30
        while (not answers.exists() or answers.read_text().count("\n") < 5) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        before = answers.read_text().count("\n")
        assert 5 <= before < 12 * len(METHODS)
        again = luthier(*command(problems, bad.url, tmp_path / "killed"))
    assert again.code == 0, again.err
    assert verdicts(tmp_path / "killed") == verdicts(tmp_path / "whole")
    mine, wanted = (json.loads(run.out)["tasks"]["chains"] for run in (again, whole))
    for method in METHODS:
        assert mine[method]["accuracy"] == wanted[method]["accuracy"]
        assert mine[method]["statuses"].keys() <= {"correct", "wrong"}
    # Every whole answer was kept when the process died; only what was on its way then was paid for twice.
    assert 0 <= bad.ledger.answered - quiet.ledger.answered <= bad.ledger.most_in_flight
