"""Strict configuration: YAML or mapping -> frozen dataclass. Unknown keys, wrong types and bad values are errors.

A config class is a frozen, keyword-only dataclass with a docstring under each field. It may have two class variables:
`RENAMED` (old key -> new key) for better errors, and `PRESETS` (preset name -> field values), chosen by the field that
`PRESET_FIELD` names. The order is: defaults < preset < file < command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.files import sha256_bytes

Config = TypeVar("Config")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; ConfigError when it is missing, malformed or says a key twice."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: {reason}", hint="check the path of the configuration") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text", hint="save the file as UTF-8") from error


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML text; ConfigError, which begins with `where`, when it is malformed or says a key twice."""
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{line}: not valid YAML{f' ({problem})' if problem else ''}",
            hint="check indentation, colons and quotes there",
        ) from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML asks for unique keys; PyYAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def dump_yaml(mapping: Any) -> str:
    """YAML text in the order of the mapping."""
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120)


def build(cls: type[Config], values: Mapping[str, Any], *, where: str = "") -> Config:
    """Make the dataclass `cls` from `values`, over its preset and its defaults. `where` prefixes keys in errors."""
    merged = resolve(cls, values, where=where)
    missing = [field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in merged]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(
            f"{where}{missing[0]}: required, but not given", hint=f"add `{missing[0]}: …` or --{missing[0]}"
        )
    return cls(**merged)


def resolve(cls: type, values: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Checked and converted field values: those of the preset that `values` chooses, then `values` themselves."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where or cls.__name__}: got {_kind(values)}, expected a mapping of settings",
            hint="write one `key: value` per line",
        )
    types_ = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise _unknown_key(cls, str(key), names, where)
    return {
        name: coerce(types_[name], value, f"{where}{name}")
        for name, value in {**preset(cls, values, where=where), **values}.items()
    }


def preset(cls: type, values: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """The field values of the preset that `values` (or the default) chooses; empty for a class without presets."""
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "PRESETS", {})
    if not presets:
        return {}
    field: str = cls.PRESET_FIELD  # type: ignore[attr-defined]
    default = next(f.default for f in dataclasses.fields(cls) if f.name == field)
    chosen = values.get(field, default)
    if not isinstance(chosen, str) or chosen not in presets:
        raise ConfigError(
            f"{where}{field}: got {chosen!r}, expected one of {', '.join(presets)}{did_you_mean(str(chosen), presets)}",
            hint=f"choose one of these, or drop `{field}`",
        )
    return dict(presets[chosen])


def _unknown_key(cls: type, key: str, names: list[str], where: str) -> ConfigError:
    renamed: Mapping[str, str] = getattr(cls, "RENAMED", {})
    if key in renamed:
        return ConfigError(
            f"{where}{key}: this key is now called {renamed[key]!r}", hint=f"rename it to {renamed[key]}"
        )
    return ConfigError(
        f"{where}{key}: no such setting{did_you_mean(key, names)}", hint=f"the settings are: {', '.join(names)}"
    )


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def coerce(expected: Any, value: Any, where: str) -> Any:
    """Convert a YAML value to the annotated type, or raise ConfigError naming key, value and type."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        expects = f"one of {', '.join(map(str, arguments))}{did_you_mean(str(value), arguments)}"
        hint = "YAML reads on, off, yes and no as booleans: put quotes around the word"
        raise ConfigError(
            f"{where}: got {_kind(value)}, expected {expects}",
            hint=hint if isinstance(value, bool) else "choose one of these",
        )
    if origin in (tuple, list):
        return _coerce_sequence(origin, arguments, value, where)
    if origin is dict:
        if isinstance(value, Mapping):
            return {str(key): coerce(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif dataclasses.is_dataclass(expected):
        return value if isinstance(value, expected) else build(expected, value, where=f"{where}.")  # type: ignore[arg-type]
    elif expected is Any:
        return value
    else:
        converted = _coerce_scalar(expected, value)
        if converted is not None:
            return converted
    raise ConfigError(
        f"{where}: got {_kind(value)}, expected {type_name(expected)}", hint=f"give `{where}` a value of that type"
    )


def type_name(expected: Any) -> str:
    """A type as a user would call it: 'int', 'float float', 'one of cosine, linear', 'str …'."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments if argument is not type(None))
    if origin in (tuple, list):
        return " ".join("…" if argument is Ellipsis else type_name(argument) for argument in arguments)
    return getattr(expected, "__name__", str(expected))


def _coerce_scalar(expected: Any, value: Any) -> Any:
    """The value as the scalar type, or None where it is not one. YAML reads 1e-3 as a string: floats accept it."""
    if expected is bool:
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if expected is float and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return None if math.isnan(number) else number
    if expected is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value if isinstance(value, int) else None
    if expected is Path and isinstance(value, str | Path):
        return Path(value)
    if expected is str and isinstance(value, str):
        return value
    return None


def _coerce_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        return coerce(choices[0], value, where)
    for choice in choices:
        try:
            return coerce(choice, value, where)
        except ConfigError:
            continue
    expects = " or ".join(type_name(choice) for choice in choices)
    raise ConfigError(f"{where}: got {_kind(value)}, expected {expects}", hint=f"give `{where}` a value of these")


def _coerce_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: got {_kind(value)}, expected a list", hint=f"write `{where}: [item, item]`")
    fixed = origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    if fixed and len(value) != len(arguments):
        raise ConfigError(f"{where}: got {len(value)} items, expected {len(arguments)}", hint="give exactly that many")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return origin(
        coerce(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as plain YAML types, in field order."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def digest(mapping: Any) -> str:
    """SHA-256 of a plain mapping, independent of key order."""
    return sha256_bytes(json.dumps(_plain(mapping), sort_keys=True, ensure_ascii=False).encode())


def diff(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> list[str]:
    """'key: old -> new' for every difference of two plain mappings, nested keys joined by dots."""
    before, after = _flatten(old), _flatten(new)
    skipped = tuple(ignore)
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, ...) != after.get(key, ...) and key.split(".")[0] not in skipped
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def override(mapping: dict[str, Any], assignment: str) -> None:
    """Apply one 'a.b=value' (the value is YAML) to a nested mapping, in place."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"{assignment!r}: expected key=value", hint="for example --set pretrain.steps=100")
    *parents, last = path.split(".")
    for key in parents:
        mapping = mapping.setdefault(key, {})
        if not isinstance(mapping, dict):
            raise ConfigError(
                f"{path}: {key!r} is a value, not a section", hint="check the path before the equals sign"
            )
    if not last:
        raise ConfigError(f"{assignment!r}: expected key=value", hint="for example --set pretrain.steps=100")
    mapping[last] = parse_yaml(text, where=path)
