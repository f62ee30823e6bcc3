"""Verified rewards: replies are graded by `tasks.grading`, whose algebra runs in processes with a deadline.

Training waits for a checker at most so long, and a checker that dies or hangs makes a reply that counts as not solved,
apart from wrong ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from luthier.tasks.answers import extract_answer
from luthier.tasks.grading import Grader, Status
from luthier.tasks.task import Problem

STATUSES: tuple[Status, ...] = ("correct", "wrong", "unparsed", "timeout")


class Marker:
    """Grades many replies at once, from code that is not asynchronous. Use it as a context manager."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._runner = asyncio.Runner()

    def __enter__(self) -> Marker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._grader.aclose())
        self._runner.close()

    def statuses(self, replies: Sequence[str], problems: Sequence[Problem]) -> list[Status]:
        """The verdict on each reply to its problem; one without an answer, cut short or not, is `unparsed`."""
        return self._runner.run(self._all(replies, problems))

    async def _all(self, replies: Sequence[str], problems: Sequence[Problem]) -> list[Status]:
        pairs = zip(replies, problems, strict=True)
        grades = await asyncio.gather(*(self._grader.grade(extract_answer(reply), problem) for reply, problem in pairs))
        return [grade.status for grade in grades]


def shares(statuses: Sequence[Status]) -> dict[str, float]:
    """The share of each verdict."""
    counts = Counter(statuses)
    return {name: counts[name] / len(statuses) for name in STATUSES}
