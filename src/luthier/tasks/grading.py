"""Is an answer right? A ladder: equal text, equal exact number, equal by algebra (math-verify).

Algebra runs in worker processes with a deadline; what times out or cannot be read is reported as such, apart from
wrong. Nothing is executed, and an unreadable answer never equals an unreadable gold.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.core.errors import MissingExtra
from luthier.tasks.answers import normalize, same_quick
from luthier.tasks.sudoku import read_grid, solves
from luthier.tasks.task import Problem

LONGEST = 2000
"""Characters; longer answers are not given to algebra."""
START_SECONDS = 120.0
"""Until a worker is there: it imports sympy."""
Status = Literal["correct", "wrong", "unparsed", "timeout"]
Comparison = Literal["same", "different", "unparsed", "timeout"]
_STATUS: dict[Comparison, Status] = {
    "same": "correct",
    "different": "wrong",
    "unparsed": "unparsed",
    "timeout": "timeout",
}


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer; `how` names what decided: text, exact, algebra, words, rules, letter or option."""

    status: Status
    how: str


@dataclass(frozen=True)
class Cluster:
    """Answers that mean the same: the first of them, and the indices of all."""

    answer: str
    members: tuple[int, ...]


class Grader:
    """Grades, compares and groups answers. Use it as an async context manager; one for a whole program is enough.

    `workers`: processes for algebra, started when first needed; `deadline`: seconds for one comparison;
    `memory`: MiB of address space each.
    """

    def __init__(self, *, workers: int = 2, deadline: float = 5.0, memory: int = 2048) -> None:
        self._deadline = deadline
        self._memory = memory
        self._idle: asyncio.LifoQueue[_Worker | None] = asyncio.LifoQueue()
        for _ in range(workers):
            self._idle.put_nowait(None)
        self._workers: set[_Worker] = set()
        self._known: dict[tuple[str, str], Comparison] = {}

    async def __aenter__(self) -> Grader:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the workers."""
        for worker in list(self._workers):
            await worker.kill()
        self._workers.clear()

    async def grade(self, answer: str | None, problem: Problem) -> Grade:
        """The verdict on an answer (None: none was found)."""
        if answer is None or not answer.strip():
            return Grade("unparsed", "text")
        if problem.kind == "sudoku":
            return _grade_sudoku(answer, problem)
        if problem.kind == "choice":
            return _grade_choice(answer, problem)
        if problem.kind == "exact":
            same = normalize(answer) == normalize(problem.answer)
            return Grade("correct" if same else "wrong", "words")
        quick = same_quick(problem.answer, answer)
        if quick is not None:
            return Grade("correct" if quick else "wrong", "exact")
        return Grade(_STATUS[await self._compare(problem.answer, answer)], "algebra")

    async def equivalent(self, a: str, b: str) -> bool | None:
        """Whether two answers mean the same, in whatever order; None: it cannot be decided."""
        quick = same_quick(a, b)
        if quick is not None:
            return quick
        first = await self._compare(a, b)
        if first == "same":
            return True
        second = await self._compare(b, a)
        if second == "same":
            return True
        return False if "different" in (first, second) else None

    async def cluster(self, answers: Sequence[str | None]) -> list[Cluster]:
        """Answers grouped by meaning, None left out; largest first, ties by first appearance."""
        groups: list[tuple[str, list[int]]] = []
        for index, answer in enumerate(answers):
            if answer is None:
                continue
            for first, members in groups:
                if await self.equivalent(first, answer):
                    members.append(index)
                    break
            else:
                groups.append((answer, [index]))
        clusters = [Cluster(answer, tuple(members)) for answer, members in groups]
        return sorted(clusters, key=lambda cluster: -len(cluster.members))

    async def _compare(self, gold: str, answer: str) -> Comparison:
        if max(len(gold), len(answer)) > LONGEST:
            return "unparsed"
        key = (gold, answer)
        if key not in self._known:
            self._known[key] = await self._ask(gold, answer)
        return self._known[key]

    async def _ask(self, gold: str, answer: str) -> Comparison:
        worker = await self._idle.get()
        try:
            if worker is None:
                worker = await _Worker.start(self._memory)
                self._workers.add(worker)
            async with asyncio.timeout(self._deadline):  # wait_for may lose a cancellation in Python 3.11
                same = await worker.compare(gold, answer)
        except BaseException as error:  # late, dead or cancelled: what it would still say must not be read
            if worker is not None:
                self._workers.discard(worker)
                await worker.kill()
            worker = None
            if isinstance(error, TimeoutError | EOFError):
                return "timeout" if isinstance(error, TimeoutError) else "unparsed"
            raise
        finally:
            self._idle.put_nowait(worker)
        return "unparsed" if same is None else "same" if same else "different"


class _Worker:
    """A process that compares answers, one at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, memory: int) -> _Worker:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtra(
                "comparing answers by algebra needs the package 'math_verify', which is not installed",
                hint="pip install 'luthier[reason]'",
            )
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "luthier.tasks.grading_worker", str(memory))
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                await worker._read()
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def compare(self, gold: str, answer: str) -> bool | None:
        assert self._process.stdin is not None
        line = json.dumps({"gold": gold, "answer": answer}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise EOFError from error
        return (await self._read())["same"]

    async def _read(self) -> dict[str, bool | None]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise EOFError("the worker died")
        return json.loads(line)

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        transport = getattr(self._process, "_transport", None)
        if transport is not None:
            transport.close()


def _grade_sudoku(answer: str, problem: Problem) -> Grade:
    puzzle = read_grid(str(problem.metadata.get("puzzle", problem.prompt)), blanks=True)
    grid = read_grid(answer)
    digits = re.sub(r"\D", "", answer)
    if grid is None and len(digits) == len(re.sub(r"\D", "", problem.answer)):
        size = round(len(digits) ** 0.5)
        grid = [list(digits[row * size : (row + 1) * size]) for row in range(size)]
    if grid is None:
        return Grade("unparsed", "rules")
    right = re.sub(r"\D", "", problem.answer) == digits or (puzzle is not None and solves(grid, puzzle))
    return Grade("correct" if right else "wrong", "rules")


def _grade_choice(answer: str, problem: Problem) -> Grade:
    gold = normalize(problem.answer).upper()
    match = re.match(r"^\W*(?:option\s+)?([A-Z])(?:\W|$)", answer.strip(), re.IGNORECASE)
    if match and (len(answer.strip(" ().*")) == 1 or re.match(r"^\W*[A-Z][).:]", answer.strip(), re.IGNORECASE)):
        return Grade("correct" if match[1].upper() == gold else "wrong", "letter")
    for position, option in enumerate(problem.metadata.get("options", ())):
        if normalize(str(option)) == normalize(answer):
            return Grade("correct" if chr(ord("A") + position) == gold else "wrong", "option")
    return Grade("unparsed", "letter")
