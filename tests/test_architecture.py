"""The rules of the layout, read from the source with `ast`, and from what importing really loads."""

from __future__ import annotations

import ast
import importlib.util
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier

SOURCE = Path(luthier.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROWS = (
    ("core",),
    ("data", "models"),
    ("llm",),
    ("tasks", "learn"),
    ("entropy", "reason", "train", "distill", "quantize"),
    ("serve", "report"),
    ("cli",),
)
LEVEL = {package: level for level, row in enumerate(ROWS) for package in row}
METHODS = ROWS[4]
WITH_TORCH = {"llm.local", "llm.generation", "llm.sampling"}
HEAVY = {"torch", "transformers", "rich", "tyro"}


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that the source of a file in `package` imports: at the top, in functions, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_light(name: str) -> bool:
    """Whether a module promises to load neither torch nor transformers."""
    package, _, module = name.partition(".")
    if package in ("core", "tasks", "reason", "report") or name == "serve.app":
        return True
    return (package == "llm" and name not in WITH_TORCH) or (package in METHODS and module == "config")


def ids(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def test_every_package_has_its_row() -> None:
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert packages <= set(LEVEL)
    assert {"core", "data", "models", "llm", "learn", "train", "report", "cli"} <= packages


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != SOURCE], ids=ids)
def test_imports_point_down(file: Path) -> None:
    own = file.relative_to(SOURCE).parts[0]
    for name in imports(file.read_text(), f"luthier.{own}"):
        target = name.split(".")[1] if name.startswith("luthier.") else own
        if target != own and target in LEVEL:
            assert LEVEL[target] < LEVEL[own], f"{own} (row {LEVEL[own]}) imports {name} (row {LEVEL[target]})"


def test_light_modules_load_neither_torch_nor_transformers() -> None:
    light = sorted(f"luthier.{name}" for name in map(module_name, FILES) if is_light(name))
    assert {"luthier.core.run", "luthier.llm.endpoint", "luthier.train.config", "luthier.report.html"} <= set(light)
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) < 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 < 60, f"{node.name} is too long"


@pytest.mark.parametrize("extra", ["torch", "train", "reason"])
def test_what_grades_answers_is_installed_wherever_something_asks_it_to(extra: str) -> None:
    """The worker that compares by algebra is started by its file name, and needed only by some answers of a run."""
    extras = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    waiting, found = [extra], set[str]()
    while waiting:
        for requirement in extras[waiting.pop()]:
            name, _, inside = re.match(r"([\w-]+)(\[(.*)\])?", requirement).groups()
            found.add(name)
            waiting += inside.split(",") if inside else []
    assert "math-verify" in found


def test_no_file_is_named_after_nothing() -> None:
    assert not {file.stem for file in FILES} & {"utils", "util", "helpers", "helper", "common", "misc", "base"}


@pytest.mark.parametrize("init", sorted(SOURCE.glob("*/__init__.py")), ids=ids)
def test_a_package_lists_its_modules_in_its_docstring(init: Path) -> None:
    doc = ast.get_docstring(ast.parse(init.read_text())) or ""
    if init.parent.name == "cli":  # its verbs are listed by `luthier --help`
        assert "main" in doc
        assert "options" in doc
        return
    names = doc.replace("`", " ").replace(",", " ").replace(".py", " ").replace("(", " ").replace(".", " ").split()
    missing = {file.stem for file in init.parent.glob("*.py")} - {"__init__"} - set(names)
    assert not missing, f"the docstring of {init.parent.name} does not name {sorted(missing)}"


def processor_seconds() -> float:
    """Of the processes that this one has waited for; other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom luthier.cli.main import main\n"
        f"assert main(['--help']) == 0\nassert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)\n"
    )
    seconds = []
    for _ in range(5):
        began = processor_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(processor_seconds() - began)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3, seconds


def test_the_reader_of_imports_sees_all_kinds() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from luthier import cli
def inside():
    import luthier.serve.app
    from .. import report
    from ..train import config
"""
    names = set(imports(source, "luthier.core"))
    assert {"luthier.cli", "luthier.serve.app", "luthier.report", "luthier.train.config"} <= names
