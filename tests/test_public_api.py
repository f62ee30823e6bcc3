"""Public names are documented and typed, and no option appears or changes unseen.

After adding, changing or removing an option, rewrite the list of options and read its diff:

    python tests/test_public_api.py > tests/options.txt
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier
from luthier.cli.main import VERBS, load_config
from luthier.core.config import preset, type_name

SOURCE = Path(luthier.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
OPTIONS = Path(__file__).with_name("options.txt")
MOST_FIELDS = 38
Function = ast.FunctionDef | ast.AsyncFunctionDef


def ids(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes of a module, with the public methods and __init__ of the classes."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef):
            continue
        if node.name.startswith("_") and node.name != "__init__":
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{node.name}.")


def unannotated(function: Function) -> list[str]:
    """Arguments without annotation, and 'return'. `self` and `cls` need none."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in given if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None else [])


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_public_names_are_documented_and_annotated(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for name, node in public(tree.body):
        if "." not in name:
            assert ast.get_docstring(node), f"{name} has no docstring"
        if isinstance(node, Function):
            assert not unannotated(node), f"{name}: {unannotated(node)} without annotation"


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_few_settings_each_explained(verb: str) -> None:
    cls = load_config(verb)
    assert len(dataclasses.fields(cls)) <= MOST_FIELDS
    explained: dict[str, bool] = {}
    for owner in [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]:
        explained |= explanations(owner)
    assert set(explained) == {field.name for field in dataclasses.fields(cls)}
    assert all(explained.values()), f"{verb}: no docstring under {[n for n, has in explained.items() if not has]}"


def explanations(cls: type) -> dict[str, bool]:
    """Whether each field that a class declares itself has a docstring under it."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    assert ast.get_docstring(node)
    following = dict(zip(node.body, [*node.body[1:], None], strict=True))
    found = {}
    for statement in filter(is_field, node.body):
        after = following[statement]
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
        found[statement.target.id] = bool(text)  # type: ignore[attr-defined]
    return found


def is_field(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)


@pytest.mark.parametrize("verb", VERBS)
def test_configs_are_frozen_and_keyword_only(verb: str) -> None:
    cls = load_config(verb)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(cls))


def option_lines() -> Iterator[str]:
    """'verb --option type = default' for every setting of every verb."""
    for verb in VERBS:
        cls = load_config(verb)
        hints, chosen = typing.get_type_hints(cls), preset(cls, {})
        for field in dataclasses.fields(cls):
            default = chosen.get(field.name, field.default)
            shown = "(required)" if default is dataclasses.MISSING else f"= {str(default) or repr(default)}"
            yield f"{verb} --{field.name.replace('_', '-')} {type_name(hints[field.name])} {shown}"


def test_no_option_changes_unseen() -> None:
    """When this fails, run the command at the top of this file and look at the diff."""
    assert OPTIONS.read_text().splitlines() == list(option_lines())


if __name__ == "__main__":
    print(*option_lines(), sep="\n")
