from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from luthier.llm.dialect import Fault
from luthier.llm.retry import LONGEST_WAIT, backoff, is_retryable, read_retry_after

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("Thu, 01 Jan 2026 12:01:30 GMT", 90.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 12:00:30 -0000", 30.0),
        ("soon", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header, NOW) == seconds


def test_backoff_doubles_within_its_jitter_and_is_capped() -> None:
    waits = [[backoff(attempt, random.Random(seed)) for seed in range(50)] for attempt in range(12)]
    assert all(0.25 * 2**a <= wait <= 0.5 * 2**a for a in range(6) for wait in waits[a])
    assert len(set(waits[0])) > 40
    assert max(waits[11]) <= LONGEST_WAIT


def test_what_is_tried_again() -> None:
    assert [s for s in range(400, 600) if is_retryable(Fault(status=s, message=""))] == [
        408, 409, 425, 429, 500, 502, 503, 504, 529,
    ]  # fmt: skip
    assert not is_retryable(Fault(status=429, message="", code="insufficient_quota"))
