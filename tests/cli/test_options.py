from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import tyro

from luthier.cli.options import parse
from luthier.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a verb that does nothing."""

    PRESET_FIELD: ClassVar[str] = "size"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"s": {"steps": 10, "rate": 0.5}, "l": {"steps": 99}}

    model: tyro.conf.Positional[str]
    """A model."""
    size: Literal["s", "l"] = "s"
    """A preset."""
    steps: int = 1
    """A number."""
    rate: float = 1.0
    """Another number."""
    data: tuple[str, ...] = ("prose",)
    """Any number of words."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""
    mask: bool = False
    """A switch."""
    out: Path | None = None
    """A path."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError("steps: got less than 0", hint="raise steps")


def settings(*argv: str) -> Settings:
    return parse(Settings, argv, "luthier test")


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "c.yaml").write_text("model: stored\nsteps: 5\nrate: 1e-3\n")
    return str(tmp_path / "c.yaml")


def test_presets_stand_over_defaults() -> None:
    assert settings("m") == Settings(model="m", steps=10, rate=0.5)
    assert settings("m", "--size", "l") == settings("m", "--size=l") == Settings(model="m", size="l", steps=99)


def test_a_file_stands_over_presets_and_options_over_the_file(file: str) -> None:
    assert settings("--config", file) == Settings(model="stored", steps=5, rate=1e-3)
    assert settings(f"--config={file}", "--size", "l") == Settings(model="stored", size="l", steps=5, rate=1e-3)
    given = settings("other", "--config", file, "--steps", "7", "--data", "a", "b", "--mask", "--out", "x")
    assert given == Settings(model="other", steps=7, rate=1e-3, data=("a", "b"), mask=True, out=Path("x"))


def test_lists_can_be_emptied_and_switches_switched_off(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("mask: true\ndata: [x]\n")
    given = settings("m", "--config", str(tmp_path / "c.yaml"), "--no-mask", "--data")
    assert (given.mask, given.data) == (False, ())


def test_scientific_numbers_and_equals_signs() -> None:
    assert settings("m", "--rate=1e-3", "--betas", "0", "1e-8").betas == (0.0, 1e-8)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["m", "--steps", "abc"], "--steps: got 'abc', expected int"),
        (["m", "--steps=abc"], "--steps: got 'abc', expected int"),
        (["m", "--steps"], "--steps: got nothing, expected int"),
        (["m", "--betas", "0.9"], "--betas: got '0.9', expected float float"),
        (["m", "--betas", "0.9", "x"], "--betas: got '0.9' 'x', expected float float"),
        (["m", "--size", "x"], "size: got 'x', expected one of s, l"),
        (["m", "--stesp", "3"], r"--stesp: no such option \(did you mean '--steps'\?\)"),
        (["m", "--steps", "1", "--steps", "2"], "--steps: given twice"),
        (["m", "--data", "a", "--data", "b"], "--data: given twice"),
        (["m", "--config"], "--config: got nothing, expected a value"),
        (["m", "--steps=-1"], "steps: got less than 0"),
        (["m", "n"], "Unrecognized options: n"),
        ([], "MODEL"),
    ],
)
def test_a_wrong_command_line_is_one_error(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        settings(*argv)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("steps: abc", "steps: got str 'abc', expected int"),
        ("stesp: 3", "stesp: no such setting .did you mean 'steps'"),
        ("size: xl", "size: got 'xl'"),
        ("- steps", "expected a mapping of settings"),
        ("", "expected a mapping of settings"),
    ],
)
def test_a_wrong_file_is_one_error(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told):
        settings("m", "--config", str(tmp_path / "c.yaml"))


def test_colors_of_a_terminal_do_not_get_into_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError) as caught:
        settings()
    assert str(caught.value) == "Missing from luthier test: MODEL A model. (required)"


def test_help_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings("--help")
    assert not caught.value.code
    shown = capsys.readouterr()
    assert "--betas FLOAT FLOAT" in shown.out
    assert shown.err == ""
