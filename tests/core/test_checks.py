from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.core.checks import above, at_least, between, expect, inside
from luthier.core.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("check", "limits", "good", "bad", "expected"),
    [
        (above, (0,), (1, 1e-9), (0, -1, NAN), "more than 0"),
        (at_least, (1,), (1, 2), (0, 0.5, NAN), "1 or more"),
        (between, (0, 1), (0, 0.5, 1), (-0.1, 1.1, NAN), "0 to 1"),
        (inside, (0, 1), (0.1, 0.9), (0, 1, NAN), "more than 0 and less than 1"),
    ],
)
def test_limits(check, limits, good, bad, expected):
    for value in good:
        check(SimpleNamespace(rate=value), *limits, "rate")
    for value in bad:
        with pytest.raises(ConfigError, match=f"^rate: got {value}, expected {expected}$"):
            check(SimpleNamespace(rate=value, other=0.5), *limits, "rate")


def test_every_setting_is_looked_at():
    with pytest.raises(ConfigError, match="second: got -1"):
        at_least(SimpleNamespace(first=1, second=-1), 0, "first", "second")


def test_a_hint_of_its_own_replaces_the_usual_one():
    for hint, told in (("", "change data, or leave it out"), ("give one", "give one")):
        with pytest.raises(ConfigError) as caught:
            expect(SimpleNamespace(data=()), "data", False, "a corpus", hint)
        assert caught.value.hint == told
