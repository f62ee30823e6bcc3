"""CachedBackend: every reply is paid for once.

A reply is stored under the SHA-256 of (model, request, sample index), so a run that was stopped, killed or extended
asks only for what it does not have: n=5 after n=3 asks for two samples and returns the first three unchanged. The store
is one SQLite file in WAL mode, synced before a reply is handed out and shared safely between processes. Failures are
never stored.

Identical requests that arrive while the first is under way wait for it (within one process). Two processes may both
ask; the first reply to arrive is kept, and both return that one.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from luthier.core.errors import DataError, EndpointError
from luthier.llm.types import Backend, Completion, Request, RequestFailed, Score, Usage, request_keys, score_key

SCHEMA_VERSION = 1
LOCK_SECONDS = 60.0  # how long to wait for other processes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY,    -- request_key or score_key
    model TEXT NOT NULL,
    question TEXT NOT NULL,  -- JSON, for people: what was asked
    reply TEXT NOT NULL,     -- JSON: a Completion or a Score
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
)
"""
Value = TypeVar("Value")
_Row = tuple[str, str, str, str]


class CachedBackend:
    """A `Backend` that remembers the replies of another one in a file.

    `identity` names the model in the keys (default: the inner backend's `model`). Give one that changes with the
    weights when the name does not, e.g. a folder that is trained again.

    `hits` and `misses` count samples and scores; `usage` is what was paid now, `saved` what the hits had cost.
    """

    def __init__(self, inner: Backend, path: Path | str, *, identity: str | None = None) -> None:
        self.inner = inner
        self.hits = 0
        self.misses = 0
        self.saved = Usage()
        self._identity = identity or inner.model
        self._store = _Store(Path(path))
        self._under_way: dict[str, asyncio.Event] = {}

    @property
    def model(self) -> str:
        return self.inner.model

    @property
    def usage(self) -> Usage:
        return self.inner.usage

    def stored(self) -> Usage:
        """What all replies in the file had cost, whoever asked for them."""
        return self._store.usage()

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples: stored ones from the file, the others from the inner backend."""
        samples = range(request.first_sample, request.first_sample + request.n)
        keys = request_keys(self._identity, request, samples)

        async def fetch(claimed: list[int]) -> dict[int, Completion]:
            runs = [self._fetch_run(request, run, keys) for run in _runs(claimed)]
            fetched: dict[int, Completion] = {}
            for result in await asyncio.gather(*runs, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
                fetched |= result
            return fetched

        replies = await self._gather(keys, fetch, Completion.from_json)
        return [replies[index] for index in samples]

    async def score(self, prompt: str, completion: str) -> Score:
        """The stored score, or the inner backend's."""
        key = score_key(self._identity, prompt, completion)

        async def fetch(_: list[int]) -> dict[int, Score]:
            score = await self.inner.score(prompt, completion)
            question = {"prompt": prompt, "completion": completion}
            return {0: score} if await self._store.put(self._identity, question, {key: score}) else {}

        return (await self._gather({0: key}, fetch, Score.from_json))[0]

    async def aclose(self) -> None:
        """Close the file and the inner backend."""
        await self._store.aclose()
        await self.inner.aclose()

    async def _fetch_run(self, request: Request, run: range, keys: dict[int, str]) -> dict[int, Completion]:
        """Ask the inner backend for neighboring samples; what a partly failed call did return is stored too.

        Returns nothing where another process may have stored others first: then those count.
        """

        async def store(completions: Iterable[Completion]) -> bool:
            replies = {keys[completion.index]: completion for completion in completions}
            return await self._store.put(self._identity, request.canonical(), replies)

        try:
            completions = await self.inner.complete(replace(request, first_sample=run.start, n=len(run)))
        except RequestFailed as failure:
            await store(failure.completions)
            raise
        if [completion.index for completion in completions] != list(run):
            raise EndpointError(
                f"{self.model} returned samples {[c.index for c in completions]}, expected {list(run)}",
                hint="the backend does not follow the Backend protocol",
            )
        return {c.index: c for c in completions} if await store(completions) else {}

    async def _gather(
        self,
        keys: dict[int, str],
        fetch: Callable[[list[int]], Coroutine[Any, Any, dict[int, Any]]],
        parse: Callable[[dict[str, Any]], Any],
    ) -> dict[int, Any]:
        """The replies under all keys. What nobody has asked for yet is claimed and fetched; the rest is waited for.

        A waiter whose leader failed or was cancelled looks again and, finding nothing, claims the key itself.
        """
        found: dict[int, Any] = {}
        mine: set[int] = set()
        while missing := [index for index in keys if index not in found]:
            for index in missing:
                if (value := self._store.get(keys[index])) is not None:
                    found[index] = parse(value)
                    self._count(found[index].usage, hit=index not in mine)
            missing = [index for index in missing if index not in found]
            claimed = [index for index in missing if keys[index] not in self._under_way]
            if claimed:
                mine |= set(claimed)
                fetched = await self._lead([keys[index] for index in claimed], fetch(claimed))
                for index, value in fetched.items():
                    found[index] = value
                    self._count(value.usage, hit=False)
            elif missing:
                await self._under_way[keys[missing[0]]].wait()
        return found

    async def _lead(self, keys: Iterable[str], fetch: Coroutine[Any, Any, dict[int, Any]]) -> dict[int, Any]:
        done = asyncio.Event()
        claimed = dict.fromkeys(keys, done)
        self._under_way |= claimed
        try:
            return await fetch
        finally:
            for key in claimed:
                del self._under_way[key]
            done.set()

    def _count(self, usage: Usage, *, hit: bool) -> None:
        if hit:
            self.hits += 1
            self.saved += usage
        else:
            self.misses += 1


def _runs(indices: list[int]) -> list[range]:
    """Sorted indices as maximal runs of neighbors: [3, 4, 7] -> [range(3, 5), range(7, 8)]."""
    runs: list[range] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


def _rows(model: str, question: Any, replies: Mapping[str, Completion | Score]) -> list[_Row]:
    # Both may hold half a surrogate pair, which UTF-8 cannot: it is written as JSON's escape.
    asked = json.dumps(question, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return [(key, model, asked, json.dumps(reply.to_json())) for key, reply in replies.items()]


def _open(batch: Iterable[tuple[Any, asyncio.Future[bool]]]) -> list[asyncio.Future[bool]]:
    """Those whose callers were not cancelled."""
    return [done for _, done in batch if not done.done()]


class _Store:
    """The SQLite file. It is read on the event loop, which takes well under a millisecond. A thread writes: a sync to
    disk takes longer than all else, so replies that come while one is under way are written together after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db, self._written = self._connect(), self._connect()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replies")
        self._waiting: list[tuple[Sequence[_Row], asyncio.Future[bool]]] = []
        self._writing: asyncio.Task[None] | None = None
        try:
            self._guard(self._prepare)
        except DataError:
            self._db.close()
            self._written.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        options: dict[str, Any] = {"timeout": LOCK_SECONDS, "isolation_level": None, "check_same_thread": False}
        return self._guard(lambda: sqlite3.connect(self.path, **options))

    def _prepare(self) -> None:
        self._enter_wal()
        self._written.execute("PRAGMA synchronous=FULL")  # a reply is paid for: it must survive a power cut too
        self._db.execute(_SCHEMA)
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise DataError(
                f"{self.path} is a reply cache of version {version}, expected {SCHEMA_VERSION}",
                hint="use another file, or the luthier version that wrote it",
            )
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _enter_wal(self) -> None:
        """Switch to write-ahead logging; SQLite refuses at once, ignoring its timeout, while another does the same."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def get(self, key: str) -> dict[str, Any] | None:
        row = self._guard(lambda: self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone())
        if row is None:
            return None
        value: dict[str, Any] = json.loads(row[0])
        return value

    async def put(self, model: str, question: Any, replies: Mapping[str, Completion | Score]) -> bool:
        """Returns when the replies, by key, are on disk: whether none can have been there before. They get there too
        when the caller is cancelled meanwhile."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((_rows(model, question, replies), done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        return await done

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            rows = [row for some, _ in batch for row in some]
            try:
                new = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, rows)
            except Exception as error:
                for done in _open(batch):
                    done.set_exception(error)
            else:
                for done in _open(batch):
                    done.set_result(new == len(rows))

    def _write(self, rows: Sequence[_Row]) -> int:
        """Store rows whose keys are not there yet; how many those were."""
        insert = "INSERT OR IGNORE INTO replies (key, model, question, reply) VALUES (?, ?, ?, ?)"

        def transaction() -> int:
            self._written.execute("BEGIN IMMEDIATE")
            with self._written:  # commits, or rolls back
                return self._written.executemany(insert, rows).rowcount

        return self._guard(transaction)

    def usage(self) -> Usage:
        names = [field.name for field in fields(Usage)]
        sums = ", ".join(f"coalesce(sum(json_extract(reply, '$.usage.{name}')), 0)" for name in names)
        row = self._guard(lambda: self._db.execute(f"SELECT {sums} FROM replies").fetchone())
        return Usage(**dict(zip(names, row, strict=True)))

    async def aclose(self) -> None:
        """Write what waits, and close the file."""
        rows = [row for some, _ in self._waiting for row in some]
        self._waiting = []
        try:
            if rows:
                self._thread.submit(self._write, rows).result()
        finally:
            self._thread.shutdown()  # once it has written
            self._written.close()
            self._db.close()

    def _guard(self, action: Callable[[], Value]) -> Value:
        try:
            return action()
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path} cannot be used as a reply cache: {error}",
                hint="if the file is damaged, move it away and run again; `sqlite3 FILE .recover` may save replies",
            ) from error
