"""A program that a model wrote: cut out of the reply, checked node by node, and made exact, before anything runs it.

Only what a calculation needs is allowed: one function with the given parameters, loops and branches, names that it sets
itself, and a fixed list of functions. There are no other attributes, no strings but its docstring, no exceptions, no
imports but math and fractions (which are removed: the sandbox has both). Decimals become fractions, and so does `/`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from keyword import kwlist
from math import isfinite
from typing import ClassVar

LONGEST = 4000
"""Characters of a program."""
FUNCTIONS = frozenset(
    [
        "abs",
        "all",
        "any",
        "ceil",
        "comb",
        "divmod",
        "enumerate",
        "factorial",
        "float",
        "floor",
        "Fraction",
        "gcd",
        "int",
        "isqrt",
        "lcm",
        "len",
        "list",
        "max",
        "min",
        "perm",
        "pow",
        "prod",
        "range",
        "reversed",
        "round",
        "set",
        "sorted",
        "sqrt",
        "sum",
        "trunc",
        "tuple",
        "zip",
    ]
)
MATH = frozenset(
    ["ceil", "comb", "fabs", "factorial", "floor", "gcd", "isqrt", "lcm", "perm", "pi", "pow", "prod", "sqrt", "trunc"]
)
MODULES = {"math": MATH, "fractions": frozenset({"Fraction"})}
METHODS = frozenset({"append"})
RESERVED = frozenset({"_divide", "_power", "_exact"})
ALLOWED = (
    *(ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.If, ast.IfExp, ast.For),
    *(ast.While, ast.Break, ast.Continue, ast.Pass, ast.Expr, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.Call, ast.keyword, ast.Name, ast.Attribute, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.Subscript, ast.Slice, ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.comprehension),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


class Refused(Exception):
    """A reply holds no program that may run; the message says why."""


@dataclass(frozen=True)
class Program:
    """`source` is what the model wrote; `exact` is what runs. Both define the function `name`."""

    source: str
    exact: str
    name: str


def is_free_name(name: str) -> bool:
    """Whether a parameter may have this name: short, lower case, and nothing that a program calls."""
    return bool(re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name)) and name not in FUNCTIONS | MATH | set(MODULES) | set(
        kwlist
    )


def read_program(reply: str, parameters: Sequence[str]) -> Program:
    """The program in a reply, for parameters of these names. Raises: Refused."""
    code = _cut(reply)
    if len(code) > LONGEST:
        raise Refused("the program is too long")
    try:
        function = _function(ast.parse(code))
        _check(function, parameters)
        source = ast.unparse(function)
        exact = ast.unparse(ast.fix_missing_locations(_Exact().visit(function)))
        ast.parse(exact)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"not readable as a program: {type(error).__name__}") from error
    return Program(source, exact, function.name)


def _cut(reply: str) -> str:
    """The last fenced block with a function, or what begins with the first `def`, up to what is no code any more."""
    blocks = [block for block in re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", reply, re.DOTALL) if "def " in block]
    if blocks:
        return blocks[-1]
    start = re.search(r"^(?:def|import|from) ", reply, re.MULTILINE)
    if start is None:
        raise Refused("no function in the reply")
    lines = reply[start.start() :].splitlines()
    is_code = (not line.strip() or line[:1].isspace() or re.match(r"def |import |from |\)", line) for line in lines)
    return "\n".join(line for line, whole in zip(lines, _until_false(is_code), strict=False) if whole)


def _until_false(flags: Iterator[object]) -> Iterator[bool]:
    for flag in flags:
        if not flag:
            return
        yield True


def _function(module: ast.Module) -> ast.FunctionDef:
    """The one function, without annotations and docstring. What stands beside it is not part of the program."""
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1:
        raise Refused(f"not one function: {len(functions)}")
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node)
    (function,) = functions
    function.returns = None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    plain = _Plain().visit(function)
    assert isinstance(plain, ast.FunctionDef)
    return plain


def _check_import(node: ast.Import | ast.ImportFrom) -> None:
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    for module in modules:
        if module not in MODULES:
            raise Refused(f"imports: {module}")
    if any(alias.asname for alias in node.names):
        raise Refused("imports under another name")
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if alias.name not in MODULES[modules[0]]:
                raise Refused(f"imports: {alias.name}")


class _Plain(ast.NodeTransformer):
    """Imports inside the function go, once checked; `x: int = 3` becomes `x = 3`."""

    def visit_Import(self, node: ast.Import) -> ast.Pass:
        _check_import(node)
        return ast.Pass()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.Pass:
        _check_import(node)
        return ast.Pass()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign | ast.Pass:
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def _check(function: ast.FunctionDef, parameters: Sequence[str]) -> None:
    arguments = function.args
    names = [argument.arg for argument in arguments.args]
    extra = [*arguments.posonlyargs, *arguments.kwonlyargs, *arguments.defaults, *arguments.kw_defaults]
    if extra or arguments.vararg or arguments.kwarg or sorted(names) != sorted(parameters):
        raise Refused(f"other parameters: {len(names)} ({', '.join(names)[:80]}), expected {', '.join(parameters)}")
    if function.decorator_list:
        raise Refused("has a decorator")
    for node in ast.walk(function):
        if not isinstance(node, ALLOWED) or (isinstance(node, ast.FunctionDef) and node is not function):
            raise Refused(f"uses: {type(node).__name__}")
        if isinstance(node, ast.Constant) and (isinstance(node.value, str | bytes | complex) or node.value is ...):
            raise Refused("uses a constant that is no number")
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and not isfinite(node.value):
            raise Refused("uses a constant that is not finite")
    _check_names(function, parameters)
    _check_calls(function)


def _check_names(function: ast.FunctionDef, parameters: Sequence[str]) -> None:
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    for name in sorted(stored | loaded | {function.name}):
        if name.startswith("__") or name in RESERVED:
            raise Refused(f"uses the name: {name}")
    if taken := stored & (FUNCTIONS | set(MODULES) | {function.name}):
        raise Refused(f"sets: {min(taken)}")
    if unknown := loaded - stored - set(parameters) - FUNCTIONS - set(MODULES) - {"fabs", "pi", function.name}:
        raise Refused(f"uses the name: {min(unknown)}")
    if unused := set(parameters) - loaded:
        raise Refused(f"does not use: {min(unused)}")
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            read = {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
            written = {t.id for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name)}
            if lost := (written & set(parameters)) - read:
                raise Refused(f"overwrites: {min(lost)}")


def _check_calls(function: ast.FunctionDef) -> None:
    """Attributes: what math and fractions have, and `append`; calls: of those and of the known functions."""
    modules = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr not in MODULES.get(base, METHODS) or not isinstance(node.ctx, ast.Load):
                raise Refused(f"uses the attribute: {node.attr}")
            modules |= {id(node.value)} if base in MODULES else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in FUNCTIONS | {function.name, "fabs"}:
                raise Refused(f"calls: {node.func.id}")
        elif isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            raise Refused("calls what is no function")
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in MODULES and id(node) not in modules:
            raise Refused(f"uses the name: {node.id}")


class _Exact(ast.NodeTransformer):
    """Decimals as fractions of what is written (0.15 is 3/20), exact division and powers."""

    NAMES: ClassVar[dict[type, str]] = {ast.Div: "_divide", ast.Pow: "_power"}

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return _call("_exact", ast.Constant(repr(node.value))) if isinstance(node.value, float) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        name = self.NAMES.get(type(node.op))
        return _call(name, node.left, node.right) if name else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        name = self.NAMES.get(type(node.op))
        if name is None:
            return node
        if not isinstance(node.target, ast.Name):
            raise Refused("divides in place")
        return ast.Assign(targets=[node.target], value=_call(name, ast.Name(node.target.id), node.value))


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(name), args=list(arguments), keywords=[])
