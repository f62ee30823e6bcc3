"""Which failures are worth another try, and how long to wait first. Pure functions."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from luthier.llm.dialect import Fault

# The request was fine and may succeed later. 400, 401, 403, 404, 422 never will.
RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
CUT_OFF = "cut_off"  # our own code for an answer of which only the beginning arrived
FIRST_WAIT = 0.5  # seconds
LONGEST_WAIT = 60.0


def is_retryable(fault: Fault) -> bool:
    """Whether the same request can succeed later; an exhausted account says 429 too, and cannot."""
    return fault.code == CUT_OFF or (fault.status in RETRYABLE and fault.code != "insufficient_quota")


def backoff(attempt: int, rng: random.Random) -> float:
    """Seconds to wait after failed attempt 0, 1, ...: doubling, with jitter in [0.5, 1] of the full wait."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * rng.uniform(0.5, 1.0)


def read_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds asked for by a Retry-After header (a number or an HTTP date); None when absent or unreadable."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:  # "-0000" means UTC from an unknown place
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
