"""Runs one program on several arguments, locked in: JSON on standard input, a JSON line per result on standard output.

Started as `python -I -S THIS_FILE SECONDS MEBIBYTES` by `sandbox`, with no environment; it imports the standard library
only, all of it before the program is compiled. From then on the process can open no file and no socket and start no
process: the limits of the system forbid it, and an audit hook ends the process at the first try. Arithmetic is exact:
a division gives a fraction, and `int` and `round` refuse to change a value.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

LONGEST = 10**60
"""Larger numbers are no answers."""
HARMLESS = ("object.__getattr__", "object.__setattr__", "object.__delattr__", "builtins.id")


def main() -> None:
    """Answer {"source", "name", "arguments": [{name: "p/q"}], "may_round"} with {"index", "value" or "error"} lines.

    A line {"ready": true} comes first, when all is set up: the clock of whoever asks starts there.
    """
    seconds, mebibytes = int(sys.argv[1]), int(sys.argv[2])
    asked = json.load(sys.stdin)
    code = _compile(asked["source"])
    arguments = [{name: plain(Fraction(text)) for name, text in one.items()} for one in asked["arguments"]]
    calls = [(namespace(may_round=asked["may_round"]), one) for one in arguments]
    state = {"index": 0, "own": False}
    write_bytes, leave = os.write, os._exit

    def say(**result: str) -> None:
        write_bytes(1, json.dumps({"index": state["index"], **result}).encode() + b"\n")

    def end(event: str) -> None:
        say(error=f"forbidden: {event}")
        leave(1)

    _limit(seconds, mebibytes << 20)
    for module in (os, sys.modules[os.name]):  # the calls that no audit hook hears of are gone too
        vars(module).clear()
    sys.addaudithook(_hook(state, end))
    write_bytes(1, b'{"ready": true}\n')
    for index, (names, one) in enumerate(calls):
        state["index"] = index
        say(**_run(code, asked["name"], names, one, state))
    leave(0)


def _compile(source: str) -> Any:
    """The code, or else what is wrong with it, in words."""
    try:
        return compile(source, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"[:200]


def _run(
    code: Any, name: str, names: dict[str, Any], arguments: dict[str, Any], state: dict[str, Any]
) -> dict[str, str]:
    if isinstance(code, str):
        return {"error": code}
    try:
        state["own"] = True  # this one `exec` is ours
        exec(code, names)
        return {"value": write(names[name](**arguments))}
    except (Exception, RecursionError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def write(result: Any) -> str:
    """A program's result as "p/q". Raises: ValueError when it is no finite number of a sensible size."""
    if isinstance(result, bool) or not isinstance(result, int | float | Fraction):
        raise ValueError(f"the result is a {type(result).__name__}, not a number")
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError("the result is not finite")
    value = Fraction(result)
    if abs(value.numerator) >= LONGEST or value.denominator >= LONGEST:
        raise ValueError("the result has too many digits")
    return f"{value.numerator}/{value.denominator}"


def plain(value: Any) -> Any:
    """A whole fraction as an integer, so that it may count and index."""
    return value.numerator if isinstance(value, Fraction) and value.denominator == 1 else value


def divide(a: Any, b: Any) -> Any:
    """a / b, exactly."""
    return plain(Fraction(a) / Fraction(b))


def power(a: Any, b: Any) -> Any:
    """a ** b, exactly where b is whole."""
    exponent = plain(b)
    return plain(Fraction(a) ** exponent) if isinstance(exponent, int) else float(a) ** float(exponent)


def root(value: Any) -> Any:
    """The square root: exact of the square of a fraction, a float otherwise."""
    exact = Fraction(value)
    above, below = math.isqrt(exact.numerator), math.isqrt(exact.denominator)
    is_square = above**2 == exact.numerator and below**2 == exact.denominator
    return plain(Fraction(above, below)) if is_square else math.sqrt(value)


def whole(value: Any) -> int:
    """`int`, but never cutting anything off."""
    if Fraction(value).denominator != 1:
        raise ValueError("int() would cut off a part")
    return int(value)


def exactly(value: Any, places: int | None = None) -> Any:
    """`round`, but never changing anything."""
    rounded = round(Fraction(value), places)
    if rounded != value:
        raise ValueError("round() would change the value")
    return plain(rounded)


def rounded(value: Any, places: int | None = None) -> Any:
    """`round`, with halves away from zero as people do."""
    unit = 10 ** (places or 0)
    scaled = abs(Fraction(value)) * unit
    return plain(Fraction(math.floor(scaled + Fraction(1, 2)), unit) * (1 if value >= 0 else -1))


def namespace(*, may_round: bool) -> dict[str, Any]:
    """Everything that a program finds: exact arithmetic, and functions that reach nothing outside."""
    rounding: Callable[..., Any] = rounded if may_round else exactly
    exact = {"int": whole, "float": lambda x: plain(Fraction(x)), "round": rounding, "pow": power, "Fraction": Fraction}
    safe = (abs, all, any, divmod, enumerate, len, list, max, min, range, reversed, set, sorted, sum, tuple, zip)
    mathematics = {
        **{f.__name__: f for f in (math.ceil, math.comb, math.factorial, math.floor, math.gcd, math.isqrt)},
        **{f.__name__: f for f in (math.lcm, math.perm, math.prod, math.trunc)},
        "sqrt": root,
        "pow": power,
        "fabs": abs,
        "pi": math.pi,
    }
    return {
        "__builtins__": {f.__name__: f for f in safe} | exact,
        "math": SimpleNamespace(**mathematics),
        "fractions": SimpleNamespace(Fraction=Fraction),
        **mathematics,
        **exact,
        "_divide": divide,
        "_power": power,
        "_exact": Fraction,
    }


def _limit(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: 0,  # nothing can be opened, sockets included; what is open stays so
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,  # not kept for root: there the hook stands alone
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value + 1 if name == resource.RLIMIT_CPU else value))


def _hook(state: dict[str, Any], end: Callable[[str], None]) -> Callable[[str, tuple[Any, ...]], None]:
    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec" and state["own"]:
            state["own"] = False
        elif event not in HARMLESS:
            end(event)

    return watch


if __name__ == "__main__":
    main()
