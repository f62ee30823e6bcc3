"""Errors that a user can act on: what happened, what was got and expected, and what to do next."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """Something outside luthier is wrong. The command line prints the message and the hint, one line each, and exits 2.

    `message` says what, got and expected; `hint` says what to do.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(UserError):
    """A setting is unknown, mistyped or impossible."""


class DataError(UserError):
    """An input file or corpus cannot be used."""


class CheckpointError(UserError):
    """A model folder or training state cannot be read, or does not fit."""


class EndpointError(UserError):
    """A model server refused, failed or cannot do what was asked."""


class Interrupted(UserError):
    """The work was stopped before its end, with everything saved that a resume needs."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtra with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"this needs the package {module.split('.')[0]!r}, which is not installed",
            hint=f"pip install 'luthier[{extra}]'",
        ) from error


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """' (did you mean X?)' for the closest of the known words, or ''."""
    import difflib

    matches = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
