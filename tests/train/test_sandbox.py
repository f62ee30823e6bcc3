"""What a program does that got past the check: the sandbox has to hold on its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from luthier.train import sandbox as sandbox_module
from luthier.train.sandbox import CHILD, Result, Sandbox

# From something harmless to the real builtins of the interpreter, as programs that break out do it.
BUILTINS = "Fraction.__add__.__globals__['__builtins__']"


def run(body: str, arguments: list[int] | None = None, **options: float) -> list[Result]:
    source = f"def answer(a):\n    real = {BUILTINS}\n    {body}" if "real" in body else f"def answer(a):\n    {body}"
    sandbox = Sandbox(**{"seconds": 20.0, **options})  # type: ignore[arg-type]
    values = [{"a": Fraction(value)} for value in ([1] if arguments is None else arguments)]
    return asyncio.run(sandbox.run(source, "answer", values))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A file that a program would like to write."""
    path = tmp_path / "written"
    yield path
    assert not path.exists()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return [0] * 10 ** 10", "MemoryError"),
        ("return 'x' * 10 ** 6", "ValueError: the result is a str"),
        ("return [a] * 3", "ValueError: the result is a list"),
        ("return 10 ** 70", "ValueError: the result has too many digits"),
        ("return 1e999 - 1e999", "ValueError: the result is not finite"),
        ("return a == 1", "ValueError: the result is a bool"),
        ("return None", "ValueError: the result is a NoneType"),
        ("return 1 // 0", "ZeroDivisionError"),
        ("return answer(a)", "RecursionError"),
        ("return missing", "NameError"),
        ("return (", "SyntaxError"),
        ("real['open']('{target}', 'w')", "forbidden: open"),
        ("real['__import__']('socket').socket()", "forbidden: import"),
        ("real['__import__']('os').system('touch {target}')", "AttributeError"),
        ("real['__import__']('posix').fork()", "AttributeError"),
        ("real['__import__']('subprocess')", "forbidden: import"),
        ("real['__import__']('ctypes')", "forbidden: import"),
        ("real['exec']('1')", "forbidden: compile"),
        ("real['print']('{{}}' * 10 ** 6)", "too much output"),
        ("raise real['SystemExit']", "the process died"),
    ],
)
def test_hostile_programs_end_and_reach_nothing(body: str, error: str, target: Path) -> None:
    (result,) = run(body.replace("{target}", str(target)).replace("{{}}", "{}"))
    assert result.value is None
    assert result.error.startswith(error), result


def test_what_was_late_does_not_stop_the_others() -> None:
    results = run("while a == 1: pass\n    return a / 2", [0, 1, 2, 1, 4], seconds=0.5)
    assert [result.error for result in results] == ["", "timeout", "", "timeout", ""]
    assert [result.value for result in results if not result.error] == [0, 1, 2]


def test_every_set_of_arguments_has_its_own_result_and_nothing_is_left_behind() -> None:
    body = "if a == 2: real['open']('/tmp/x')\n    math.pi = math.pi + 1\n    return int(math.pi)"
    results = run(body.replace("int(math.pi)", "a * (math.pi < 5)"), [1, 2, 3])
    assert [result.error.partition(":")[0] for result in results] == ["", "forbidden", ""]
    assert [result.value for result in results] == [1, None, 3]


def test_the_process_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seen = "import sys, os; assert dict(os.environ) in ({}, {'LC_CTYPE': 'C.UTF-8'}); print('clean')"
    assert "env={}" in Path(CHILD).with_name("sandbox.py").read_text()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", seen], env={}, capture_output=True, text=True)
    assert done.stdout == "clean\n"


def test_the_system_itself_forbids_files_and_processes() -> None:
    """Without the hook too: what the limits of the process say."""
    code = (
        f"import sys; sys.argv = ['x', '5', '256']; sys.path.insert(0, {str(CHILD.parent)!r})\n"
        "import sandbox_child, os\nread, write = os.pipe()\nsandbox_child._limit(5, 256 << 20)\n"
        "for call in (lambda: os.open('/dev/null', 0), os.pipe):\n"
        "    try:\n        call()\n        os._exit(9)\n    except OSError:\n        pass\n"
        "os.write(1, b'held')\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"held"), done.stderr


def test_cancelling_kills_the_process() -> None:
    def children() -> set[int]:
        found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", CHILD.name], capture_output=True, text=True)
        return set(map(int, found.stdout.split()))

    async def work() -> None:
        task = asyncio.ensure_future(Sandbox().run("def answer(a):\n while 1: pass", "answer", [{"a": Fraction(1)}]))
        for _ in range(200):
            await asyncio.sleep(0.02)
            if children():
                break
        assert children()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert not children()


def test_a_process_whose_output_nobody_reads_is_ended() -> None:
    async def end_it() -> int | None:
        command = (sys.executable, "-c", "print('x' * 10 ** 7)")
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
        while len(process.stdout._buffer) <= 1 << 17:  # from there on asyncio does not look at the pipe
            await asyncio.sleep(0.01)
        await asyncio.wait_for(sandbox_module._end(process), 20)
        return process.returncode

    assert asyncio.run(end_it()) == -signal.SIGKILL
