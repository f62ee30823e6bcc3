"""What a server does wrong never becomes an answer, and what it delivered is what we say it cost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from luthier.llm.endpoint import Endpoint
from luthier.llm.stub_server import Faults, StubServer
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver
from luthier.tasks.grading import Grader
from luthier.tasks.runner import Row, run_task
from luthier.tasks.task import Problem, Task

CHAINS = [Chain.draw(4, number) for number in range(10)]
TASK = Task("chains", [Problem(id=str(i), prompt=c.question, answer=c.answer) for i, c in enumerate(CHAINS)])
FAULTS = {
    "transport": Faults(dropped=0.2),
    "overloaded": Faults(errors=0.1, limited=0.2, retry_after=0.01),
    "cut off": Faults(truncated=0.2),
    "without n": Faults(one_choice=True),
}


async def answers(
    faults: Faults, out: Path, *, timeout: float = 10.0, retries: int = 8
) -> tuple[list[Row], StubServer]:
    """Rows of one run of SSR on a server with faults."""

    async def no_wait(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))

    solver = SimulatedSolver(Habits(error=0.2))
    async with StubServer(solver.reply, faults=faults) as stub, Grader() as grader:
        endpoint = Endpoint(stub.url, "stub", timeout=timeout, max_retries=retries, sleep=no_wait)

        async def one(prompt: str, seed: int, name: str) -> Solution:
            how = {"equivalence": grader.equivalent, "seed": seed}
            return await solve(prompt, Models(endpoint), parse_method("ssr"), **how)  # type: ignore[arg-type]

        rows = await run_task(TASK, one, grader, out, method="ssr", at_once=4)
        await endpoint.aclose()
    return rows, stub


def told(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [(row["problem"], row["status"], row["answer"]) for row in rows]


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_change_neither_answers_nor_costs(name: str, tmp_path: Path) -> None:
    quiet, _ = asyncio.run(answers(Faults(), tmp_path / "quiet.jsonl"))
    rows, stub = asyncio.run(answers(FAULTS[name], tmp_path / "rows.jsonl"))
    assert told(rows) == told(quiet)
    assert {row["status"] for row in rows} <= {"correct", "wrong"}
    spent = sum(row["completion_tokens"] for row in rows)
    if name == "cut off":  # the server did write what was lost on the way
        assert spent < stub.ledger.completion_tokens
    else:
        assert spent == stub.ledger.completion_tokens


def test_a_server_that_hangs_fails_its_calls_and_nothing_else(tmp_path: Path) -> None:
    rows, _ = asyncio.run(answers(Faults(hanging=0.02), tmp_path / "rows.jsonl", timeout=0.15, retries=0))
    failed = [row for row in rows if row["status"] == "failed"]
    assert 0 < len(failed) < len(rows)
    assert all("timed out" in row["error"] and "answer" not in row for row in failed)
    again, _ = asyncio.run(answers(Faults(), tmp_path / "rows.jsonl"))
    quiet, _ = asyncio.run(answers(Faults(), tmp_path / "quiet.jsonl"))
    assert told(again) == told(quiet)
