from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luthier.core.errors import ConfigError, MissingExtra, UserError, did_you_mean, require


def test_an_error_has_a_message_and_a_hint() -> None:
    error = ConfigError("steps: got 0, expected more than 0", hint="raise steps")
    assert isinstance(error, UserError)
    assert (str(error), error.hint) == ("steps: got 0, expected more than 0", "raise steps")


def test_require_imports() -> None:
    assert require("json", "torch").loads("1") == 1
    assert require("xml.dom", "torch").__name__ == "xml.dom"


def test_require_names_the_command_that_installs_what_is_missing() -> None:
    with pytest.raises(MissingExtra, match="'no_such_package'") as caught:
        require("no_such_package.inside", "train")
    assert caught.value.hint == "pip install 'luthier[train]'"


def test_a_blocked_package_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colorsys", None)
    with pytest.raises(MissingExtra):
        require("colorsys", "torch")


def test_a_package_that_is_there_but_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_one.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("broken_one", "torch")


def test_did_you_mean() -> None:
    assert did_you_mean("pretrian", ["pretrain", "eval"]) == " (did you mean 'pretrain'?)"
    assert did_you_mean("zzz", ["pretrain", "eval"]) == ""
    assert did_you_mean("10", [1, 100]) == " (did you mean '100'?)"
