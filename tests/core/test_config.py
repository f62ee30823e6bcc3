from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.config import build, coerce, diff, digest, dump_yaml, override, read_yaml, resolve, to_mapping
from luthier.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    RENAMED: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}
    PRESET_FIELD: ClassVar[str] = "size"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"steps": 10, "learning_rate": 1e-2},
        "large": {"steps": 1000, "learning_rate": 1e-4},
    }

    data: str
    size: str = "small"
    steps: int = 1
    learning_rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["cosine", "linear"] = "cosine"
    out: Path | None = None
    inner: Inner = field(default_factory=Inner)


def test_order_is_defaults_preset_values() -> None:
    assert build(Settings, {"data": "x"}) == Settings(data="x", steps=10, learning_rate=1e-2)
    large = build(Settings, {"data": "x", "size": "large", "steps": 7})
    assert (large.steps, large.learning_rate) == (7, 1e-4)


def test_an_unknown_key_names_itself_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.stesp: no such setting \(did you mean 'steps'\?\)") as caught:
        build(Settings, {"data": "x", "stesp": 3}, where="pretrain.")
    assert "learning_rate" in caught.value.hint
    with pytest.raises(ConfigError, match=r"qqqqq: no such setting$"):
        build(Settings, {"data": "x", "qqqqq": 3})


def test_a_renamed_key_says_its_new_name() -> None:
    with pytest.raises(ConfigError, match="lr: this key is now called 'learning_rate'"):
        build(Settings, {"data": "x", "lr": 1})


def test_a_required_key_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="data: required, but not given"):
        build(Settings, {})


@pytest.mark.parametrize("size", ["smal", ["small"], 3])
def test_an_unknown_preset_lists_the_known_ones(size: object) -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.size: got .*expected one of small, large"):
        build(Settings, {"data": "x", "size": size}, where="pretrain.")


def test_settings_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match="got list"):
        resolve(Settings, ["steps"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"inner\.: got int 3, expected a mapping"):
        build(Settings, {"data": "x", "inner": 3})


@pytest.mark.parametrize(
    ("expected", "value", "result"),
    [
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (int, 3.0, 3),
        (Path, "a/b", Path("a/b")),
        (tuple[float, float], [1, "1e-8"], (1.0, 1e-8)),
        (tuple[str, ...], [], ()),
        (list[int], [1, 2], [1, 2]),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (Path | None, None, None),
        (Path | None, "x", Path("x")),
        (int | str, "7b", "7b"),
        (int | str, 7, 7),
        (float | Literal["auto"], "auto", "auto"),
        (Literal["on", "off"], "on", "on"),
        (Inner, {"rate": "1e-3", "names": ["a"]}, Inner(rate=1e-3, names=("a",))),
        (Any, {"x": 1}, {"x": 1}),
    ],
)
def test_values_become_the_annotated_type(expected: Any, value: Any, result: Any) -> None:
    got = coerce(expected, value, "key")
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(
    ("expected", "value", "told"),
    [
        (int, "abc", "key: got str 'abc', expected int"),
        (int, 2.5, "key: got float 2.5, expected int"),
        (int, True, "key: got bool True, expected int"),
        (float, "fast", "key: got str 'fast', expected float"),
        (float, float("nan"), "key: got float nan, expected float"),
        (float, 10**400, "expected float"),
        (bool, 1, "key: got int 1, expected bool"),
        (bool, "yes", "key: got str 'yes', expected bool"),
        (str, 3, "key: got int 3, expected str"),
        (Path, 3, "key: got int 3, expected Path"),
        (str, None, "key: got NoneType None, expected str"),
        (tuple[float, float], [1.0], "key: got 1 items, expected 2"),
        (tuple[str, ...], "word", "key: got str 'word', expected a list"),
        (tuple[float, ...], [1, "x"], r"key\[1\]: got str 'x', expected float"),
        (dict[str, int], {"a": "x"}, r"key\.a: got str 'x', expected int"),
        (dict[str, int], [1], "key: got list"),
        (int | float, "x", "key: got str 'x', expected int or float"),
        (int | None, "x", "key: got str 'x', expected int"),
        (Literal["cosine", "linear"], "cosin", r"expected one of cosine, linear \(did you mean 'cosine'\?\)"),
        (Literal["on", "off"], ["on"], "key: got list"),
    ],
)
def test_other_values_are_refused_with_key_got_and_expected(expected: Any, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        coerce(expected, value, "key")


def test_yaml_booleans_for_words_get_a_hint() -> None:
    with pytest.raises(ConfigError, match="got bool True") as caught:
        coerce(Literal["on", "off"], True, "compile")
    assert "quotes" in caught.value.hint


def test_a_nested_error_says_where() -> None:
    with pytest.raises(ConfigError, match=r"sft\.inner\.rate: got str 'x', expected float"):
        build(Settings, {"data": "x", "inner": {"rate": "x"}}, where="sft.")


def test_a_mapping_survives_yaml() -> None:
    settings = Settings(data="ä", betas=(0.9, 1e-8), out=Path("runs/x"), inner=Inner(names=("a", "b")))
    stored = yaml.safe_load(dump_yaml(to_mapping(settings)))
    assert build(Settings, stored) == settings
    assert diff(stored, to_mapping(settings)) == []


@given(st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.booleans(), max_size=5))
def test_digest_ignores_the_order_of_keys(mapping: dict[str, Any]) -> None:
    assert digest(mapping) == digest(dict(reversed(mapping.items())))
    assert digest(mapping) != digest({**mapping, "one more key": 1})


def test_diff_names_every_change() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": None}
    new = {"a": 1, "b": {"c": 3, "d": [1]}, "more": "x"}
    assert diff(old, new) == ["b.c: 2 -> 3", "gone: None -> (absent)", "more: (absent) -> x"]
    assert diff(old, new, ignore=["b", "gone", "more"]) == []
    assert diff({"a": {}}, {"a": {"b": 1}}) != []


def test_override_sets_nested_yaml_values() -> None:
    mapping: dict[str, Any] = {"a": {"b": 1}}
    for assignment in ("a.b=2", "a.c=[1, 2]", "new.deep=text", "e=1e-3", "empty="):
        override(mapping, assignment)
    assert mapping == {"a": {"b": 2, "c": [1, 2]}, "new": {"deep": "text"}, "e": "1e-3", "empty": None}


@pytest.mark.parametrize("assignment", ["a", "=3", "a.=3", "a.b.c=1", "a.b=[1"])
def test_override_refuses_what_it_cannot_set(assignment: str) -> None:
    with pytest.raises(ConfigError):
        override({"a": {"b": 1}}, assignment)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: 1\nb: [1\n", "line 3: not valid YAML"),
        (b"a: 1\na: 2\n", "line 2: not valid YAML .*'a' is there twice"),
        (b"x:\n  a: 1\n  a: 2\n", "line 3: .*'a' is there twice"),
        (b"a: \xff\n", "not UTF-8"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_yaml(tmp_path / "c.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        read_yaml(tmp_path)


def test_a_key_that_is_no_word_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{[1]: 2}")
    with pytest.raises(ConfigError, match=r"line 1: not valid YAML .*a key must be one word"):
        read_yaml(tmp_path / "c.yaml")
