"""Answers grouped by what they mean. (The published code votes on raw strings: 1/2 and 0.5 are rivals there.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Same = Callable[[str, str], Awaitable[bool]]

UNREAD = "NA"


@dataclass(frozen=True)
class Vote:
    """An answer as it was first written, and which of the answers (indices) mean the same."""

    answer: str
    members: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many answers mean this."""
        return len(self.members)


async def tally(answers: Sequence[str | None], same: Same) -> list[Vote]:
    """Group answers by meaning; None is nobody's vote. Most votes first, ties by first appearance."""
    groups: list[tuple[str, list[int]]] = []
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        for first, members in groups:
            if answer == first or await same(first, answer):
                members.append(index)
                break
        else:
            groups.append((answer, [index]))
    return sorted((Vote(answer, tuple(members)) for answer, members in groups), key=lambda vote: -vote.count)


def tally_raw(answers: Sequence[str | None]) -> list[Vote]:
    """Group equal strings, an unread answer being the string "NA": as the published code does."""
    written = [UNREAD if answer is None else answer for answer in answers]
    counted = Counter(written)
    votes = [Vote(text, tuple(i for i, other in enumerate(written) if other == text)) for text in counted]
    return sorted(votes, key=lambda vote: -vote.count)


def decided(votes: Sequence[Vote], left: int) -> bool:
    """Whether the leading answer stays ahead whatever the `left` answers to come say."""
    if not votes:
        return False
    rival = votes[1].count if len(votes) > 1 else 0
    return votes[0].count > rival + left
