"""Command line -> config: tyro over the strict loader. Order: defaults < preset < --config FILE < options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from luthier.core import config as config_
from luthier.core.errors import ConfigError, did_you_mean

Config = TypeVar("Config")


def parse(cls: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The config of a verb. Takes `--config FILE` itself; everything else is a field of `cls`.

    Raises ConfigError for whatever the command line or the file says wrong; --help exits.
    """
    argv, file = _take(list(argv), "--config")
    values: dict[str, Any] = dict(_read(file)) if file else {}
    field = getattr(cls, "PRESET_FIELD", None)
    if field is not None:
        _, chosen = _take(list(argv), f"--{field}")
        if chosen is not None:
            values[field] = chosen
    _check_flags(cls, argv)
    default = _partial(cls, config_.resolve(cls, values))
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                cls,
                args=argv,
                prog=prog,
                default=default,
                description=cls.__doc__,
                config=(tyro.conf.PositionalMetavarFromFieldName,),
            )
    except SystemExit as error:
        if not error.code:
            raise
        hint = f"{prog} --help shows every option"
        raise ConfigError(_refused(cls, argv, refusal.getvalue()), hint=hint) from error


def _refused(cls: type, argv: Sequence[str], box: str) -> str:
    """One line for what tyro refused, which it says in a box: the option with its values, or else tyro's own words."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯─ ") for line in plain.splitlines()[1:]]
    words = " ".join(itertools.takewhile(bool, lines))  # up to the rule before the help
    hints = typing.get_type_hints(cls)
    for index, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        expected = hints.get(flag[2:].replace("-", "_"))
        if expected is None or flag not in re.findall(r"--[\w-]+", words):
            continue
        values = [value] if value else list(itertools.takewhile(lambda a: not a.startswith("--"), argv[index + 1 :]))
        suggestion = did_you_mean(" ".join(values), typing.get_args(expected))
        return f"{flag}: got {' '.join(map(repr, values)) or 'nothing'}, expected {_expects(expected)}{suggestion}"
    return words


def _expects(expected: Any) -> str:
    return "no value (a switch)" if expected is bool else config_.type_name(expected)


def _read(file: str) -> Mapping[str, Any]:
    values = config_.read_yaml(Path(file))
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: expected a mapping of settings", hint="write one `key: value` per line")
    return values


def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """argv without `flag VALUE` or `flag=VALUE`, and the value."""
    for index, argument in enumerate(argv):
        if argument == flag:
            if index + 1 == len(argv):
                raise ConfigError(f"{flag}: got nothing, expected a value", hint=f"write {flag} VALUE")
            return argv[:index] + argv[index + 2 :], argv[index + 1]
        if argument.startswith(f"{flag}="):
            return argv[:index] + argv[index + 1 :], argument.partition("=")[2]
    return argv, None


def _check_flags(cls: type, argv: Sequence[str]) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    seen = set[str]()
    for argument in argv:
        name = argument[2:].partition("=")[0].replace("-", "_")
        if not argument.startswith("--") or not name or name == "help":
            continue
        flag = "--" + name.replace("_", "-")
        if name in seen:
            raise ConfigError(f"{flag}: given twice", hint=f"give it once; several values follow one {flag}")
        seen.add(name)
        if name in names or name.removeprefix("no_") in names:
            continue
        suggestion = did_you_mean(flag, ["--" + known.replace("_", "-") for known in names])
        raise ConfigError(f"{flag}: no such option{suggestion}", hint="add --help to see them all")


def _partial(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """An unvalidated instance as tyro's default; required fields stay open for the command line to fill."""
    default = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value = values[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(default, field.name, value)
    return typing.cast("Config", default)
