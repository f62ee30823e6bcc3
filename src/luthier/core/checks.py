"""Checks that many settings need. Each raises a ConfigError that says what was got, what is expected and what to do."""

from __future__ import annotations

from luthier.core.errors import ConfigError


def expect(config: object, name: str, holds: bool, expected: str, hint: str = "") -> None:
    """ConfigError that names the setting, its value and what is expected, unless it holds."""
    if not holds:
        raise ConfigError(
            f"{name}: got {getattr(config, name)}, expected {expected}", hint=hint or f"change {name}, or leave it out"
        )


def above(config: object, limit: float, *names: str) -> None:
    """Settings have to be more than the limit; NaN is not."""
    for name in names:
        expect(config, name, getattr(config, name) > limit, f"more than {limit}", f"raise {name}")


def at_least(config: object, limit: float, *names: str) -> None:
    """Settings have to be the limit or more; NaN is not."""
    for name in names:
        expect(config, name, getattr(config, name) >= limit, f"{limit} or more", f"raise {name}")


def between(config: object, low: float, high: float, *names: str) -> None:
    """Settings have to be from `low` to `high`, both included."""
    for name in names:
        expect(config, name, low <= getattr(config, name) <= high, f"{low} to {high}", f"change {name}")


def inside(config: object, low: float, high: float, *names: str) -> None:
    """Settings have to be between `low` and `high`, both excluded."""
    for name in names:
        expected = f"more than {low} and less than {high}"
        expect(config, name, low < getattr(config, name) < high, expected, f"change {name}")
