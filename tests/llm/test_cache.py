from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from luthier.core.errors import DataError, EndpointError
from luthier.llm import CachedBackend, Completion, Request, RequestFailed, ScriptedBackend, Usage

ASK = Request(prompt="x", seed=1)


def numbered(delay: float = 0.0) -> ScriptedBackend:
    """Every reply ever made is different."""
    counter = iter(range(1000))
    return ScriptedBackend(lambda request, index: f"sample {index}, call {next(counter)}", delay=delay)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_a_second_run_pays_nothing(tmp_path: Path) -> None:
    first, second = numbered(), numbered()
    paid = asyncio.run(CachedBackend(first, tmp_path / "c.db").complete(ASK))
    cached = CachedBackend(second, tmp_path / "c.db")
    assert asyncio.run(cached.complete(ASK)) == paid
    assert second.requests == []
    assert (cached.hits, cached.misses) == (1, 0)
    assert (cached.usage, cached.saved) == (Usage(), first.usage)


def test_more_samples_ask_only_for_the_difference(tmp_path: Path) -> None:
    inner = numbered()
    cached = CachedBackend(inner, tmp_path / "c.db")

    async def main() -> tuple[list[Completion], list[Completion]]:
        three = await cached.complete(Request(prompt="x", n=3))
        return three, await cached.complete(Request(prompt="x", n=5))

    three, five = asyncio.run(main())
    assert five[:3] == three
    assert [completion.index for completion in five] == [0, 1, 2, 3, 4]
    assert [(request.first_sample, request.n) for request in inner.requests] == [(0, 3), (3, 2)]
    assert (cached.hits, cached.misses) == (3, 5)


def test_gaps_are_filled_in_order(tmp_path: Path) -> None:
    inner = numbered()
    cached = CachedBackend(inner, tmp_path / "c.db")

    async def main() -> list[Completion]:
        await cached.complete(Request(prompt="x", n=1, first_sample=1))
        return await cached.complete(Request(prompt="x", n=4))

    assert [completion.index for completion in asyncio.run(main())] == [0, 1, 2, 3]
    assert [(r.first_sample, r.n) for r in inner.requests] == [(1, 1), (0, 1), (2, 2)]


def test_other_temperature_seed_or_model_is_another_question(tmp_path: Path) -> None:
    inner = numbered()

    async def main() -> set[str]:
        cached = CachedBackend(inner, tmp_path / "c.db")
        other = CachedBackend(inner, tmp_path / "c.db", identity="other")
        requests = [ASK, Request(prompt="x", seed=2), Request(prompt="x", seed=1, temperature=0.5)]
        replies = [await cached.complete(request) for request in requests]
        return set(texts([*(r[0] for r in replies), *await other.complete(ASK)]))

    assert len(asyncio.run(main())) == 4


def test_identical_requests_under_way_make_one_call(tmp_path: Path) -> None:
    inner = numbered(delay=0.01)
    cached = CachedBackend(inner, tmp_path / "c.db")

    async def main() -> list[list[Completion]]:
        return await asyncio.gather(*(cached.complete(Request(prompt="x", n=n)) for n in (2, 2, 3, 1)))

    two, again, three, one = asyncio.run(main())
    assert two == again == three[:2]
    assert one == two[:1]
    assert [(r.first_sample, r.n) for r in inner.requests] == [(0, 2), (2, 1)]


def test_when_the_leader_is_cancelled_a_waiter_takes_over(tmp_path: Path) -> None:
    inner = numbered(delay=0.02)
    cached = CachedBackend(inner, tmp_path / "c.db")

    async def main() -> list[Completion]:
        leader = asyncio.create_task(cached.complete(ASK))
        await asyncio.sleep(0.005)
        waiter = asyncio.create_task(cached.complete(ASK))
        await asyncio.sleep(0.005)
        leader.cancel()
        return await waiter

    assert texts(asyncio.run(main())) == ["sample 0, call 0"]
    assert len(inner.requests) == 2


def test_failures_are_not_stored_but_what_succeeded_beside_them_is(tmp_path: Path) -> None:
    paid = Completion(text="paid", finish_reason="stop", index=1)
    failure = RequestFailed("down", hint="wait", status=503, completions=[paid])
    inner = ScriptedBackend([failure, "late"])
    cached = CachedBackend(inner, tmp_path / "c.db")
    with pytest.raises(RequestFailed, match="down"):
        asyncio.run(cached.complete(Request(prompt="x", n=2)))
    assert texts(asyncio.run(cached.complete(Request(prompt="x", n=2)))) == ["late", "paid"]
    assert [(r.first_sample, r.n) for r in inner.requests] == [(0, 2), (0, 1)]


def test_a_backend_that_returns_too_few_is_an_error(tmp_path: Path) -> None:
    class Short(ScriptedBackend):
        async def complete(self, request: Request) -> list[Completion]:
            return (await super().complete(request))[:-1]

    with pytest.raises(EndpointError, match="returned samples"):
        asyncio.run(CachedBackend(Short(["a", "b"]), tmp_path / "c.db").complete(Request(prompt="x", n=2)))


def test_scores_are_stored_too(tmp_path: Path) -> None:
    inner = ScriptedBackend([], scores=lambda prompt, completion: -1.5)
    cached = CachedBackend(inner, tmp_path / "c.db")

    async def main() -> list[float]:
        return [(await cached.score("a", b)).logprob for b in ("b", "b", "c")]

    assert asyncio.run(main()) == [-1.5, -1.5, -1.5]
    assert inner.scored == [("a", "b"), ("a", "c")]


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.db").write_bytes(content)
    with pytest.raises(DataError, match=r"c\.db cannot be used as a reply cache") as caught:
        CachedBackend(numbered(), tmp_path / "c.db")
    assert "move it away" in caught.value.hint


def test_a_torn_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "c.db"

    async def fill() -> None:
        cached = CachedBackend(ScriptedBackend(lambda request, index: "long " * 400), path)
        await cached.complete(Request(prompt="x", n=60))
        await cached.aclose()

    asyncio.run(fill())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(DataError, match="reply cache"):
        asyncio.run(CachedBackend(numbered(), path).complete(Request(prompt="x", n=60)))


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(DataError, match="version 99"):
        CachedBackend(numbered(), tmp_path / "c.db")


def test_threads_and_connections_share_the_file(tmp_path: Path) -> None:
    results: list[list[str]] = []

    def work() -> None:
        async def main() -> list[str]:
            cached = CachedBackend(numbered(), tmp_path / "c.db")
            found = [await cached.complete(Request(prompt=str(i))) for i in range(20)]
            await cached.aclose()
            return texts([completion for (completion,) in found])

        results.append(asyncio.run(main()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results), "the first reply that was stored is everybody's"


CRASH = """
import asyncio, os, signal, sys
from luthier.llm import CachedBackend, Request, ScriptedBackend

async def main():
    cached = CachedBackend(ScriptedBackend(lambda request, index: f"paid {request.prompt}"), sys.argv[1])
    for i in range(5):
        await cached.complete(Request(prompt=str(i)))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_paid_replies_survive_kill_9(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "c.db")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    inner = numbered()

    async def main() -> list[str]:
        cached = CachedBackend(inner, tmp_path / "c.db")
        return texts([(await cached.complete(Request(prompt=str(i))))[0] for i in range(5)])

    assert asyncio.run(main()) == [f"paid {i}" for i in range(5)]
    assert inner.requests == []


def test_half_a_surrogate_pair_is_stored(tmp_path: Path) -> None:
    async def main() -> list[str]:
        backend = CachedBackend(ScriptedBackend(["cut \ud83d"]), tmp_path / "cache.sqlite")
        try:
            return [texts(await backend.complete(Request(prompt="cut \ud83d")))[0] for _ in range(2)]
        finally:
            await backend.aclose()

    assert asyncio.run(main()) == ["cut \ud83d"] * 2


def test_replies_that_come_together_are_written_together(tmp_path: Path) -> None:
    written: list[str] = []

    async def main() -> None:
        cached = CachedBackend(numbered(delay=0.01), tmp_path / "c.db")
        cached._store._written.set_trace_callback(written.append)
        await asyncio.gather(*(cached.complete(Request(prompt=str(i))) for i in range(50)))
        await cached.aclose()

    asyncio.run(main())
    assert 1 <= sum(statement.startswith("BEGIN") for statement in written) <= 5
    assert stored(tmp_path / "c.db") == 50


def test_what_a_cancelled_caller_paid_for_is_stored(tmp_path: Path) -> None:
    async def main() -> None:
        cached = CachedBackend(numbered(), tmp_path / "c.db")
        lock = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")  # no reply can be written
        calls = [asyncio.create_task(cached.complete(Request(prompt=str(i)))) for i in range(3)]
        while not (cached._store._waiting or cached._store._writing):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        lock.execute("COMMIT")
        lock.close()
        await cached.aclose()

    asyncio.run(main())
    assert stored(tmp_path / "c.db") == 3


def test_a_reply_that_cannot_be_written_is_an_error_for_its_callers(tmp_path: Path) -> None:
    async def main() -> None:
        cached = CachedBackend(numbered(), tmp_path / "c.db")
        cached._store._written.execute("PRAGMA query_only=ON")
        with pytest.raises(DataError, match="cannot be used as a reply cache"):
            await cached.complete(ASK)
        await cached.aclose()

    asyncio.run(main())


def stored(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM replies").fetchone()[0])
