"""Runs programs that a model wrote, in a process that can do nothing but calculate.

Each batch gets a fresh, isolated interpreter (`sandbox_child`) without environment, in a session of its own; this side
keeps the clock and kills the whole process group. Nothing is ever executed in this process. The workers of
tasks.grading are not used for it: they live on from one question to the next, import this package and inherit the
environment, which is right for code of ours and wrong for code of a model's. What they taught is kept: the deadline is
on this side, and a process that was late, died or was cancelled is never listened to again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 120.0
"""Until a process is ready: a busy machine is no fault of the program's."""
READY = b'{"ready": true}\n'
MOST_OUTPUT = 1 << 16
"""Bytes; a process that writes more is ended."""


@dataclass(frozen=True)
class Result:
    """What a program made of one set of arguments: a value, or an error in words."""

    value: Fraction | None
    error: str = ""


class Sandbox:
    """Runs programs, `workers` at a time. `seconds`: of wall clock for a batch; `memory`: MiB of address space."""

    def __init__(self, *, seconds: float = 5.0, memory: int = 256, workers: int = 2) -> None:
        self._seconds = seconds
        self._memory = memory
        self._slots = asyncio.Semaphore(workers)

    async def run(
        self, source: str, name: str, arguments: Sequence[Mapping[str, Fraction]], *, may_round: bool = False
    ) -> list[Result]:
        """One result for each set of arguments, in order. Arguments after one that ends the process run in another."""
        results: list[Result] = []
        while len(results) < len(arguments):
            rest = arguments[len(results) :]
            async with self._slots:
                found, end = await self._batch(source, name, rest, may_round)
            results += found
            if len(found) < len(rest) and not (found and found[-1].error.startswith("forbidden")):
                results.append(Result(None, end))
        return results

    async def _batch(
        self, source: str, name: str, arguments: Sequence[Mapping[str, Fraction]], may_round: bool
    ) -> tuple[list[Result], str]:
        """The results up to the one that ended the process, and how it ended."""
        asked = {
            "source": source,
            "name": name,
            "arguments": [{key: str(value) for key, value in one.items()} for one in arguments],
            "may_round": may_round,
        }
        limits = (str(math.ceil(self._seconds)), str(self._memory))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(CHILD), *limits),
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        output = bytearray()
        try:
            # Not wait_for, which in Python 3.11 loses a cancellation that comes as its work ends.
            async with asyncio.timeout(START_SECONDS):
                await _start(process, json.dumps(asked).encode())
            async with asyncio.timeout(self._seconds):
                await _listen(process, output)
            end = "too much output" if len(output) > MOST_OUTPUT else "the process died"
        except TimeoutError:
            end = "timeout"
        finally:
            await _end(process)
        if process.returncode == -signal.SIGXCPU:
            end = "timeout"
        return _read(bytes(output), len(arguments)), end


async def _start(process: asyncio.subprocess.Process, asked: bytes) -> None:
    """Hand over what is asked, and wait until the process has locked itself in."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it died before it read: its silence says so
        process.stdin.write(asked)
        await process.stdin.drain()
    process.stdin.close()
    if await process.stdout.readline() != READY:
        raise ConfigError(
            "the sandbox for programs does not start", hint=f"what does `{sys.executable} -I -S {CHILD} 1 256` say?"
        )


async def _listen(process: asyncio.subprocess.Process, output: bytearray) -> None:
    """Collect what comes until the process ends or has said too much."""
    assert process.stdout is not None
    while len(output) <= MOST_OUTPUT and (piece := await process.stdout.read(MOST_OUTPUT)):
        output += piece


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process and all that it may have started, and drop what it has said since."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A full buffer would wait for a reader, and asyncio waits for the end of the output before that of the process.
    transport: Any = process._transport  # type: ignore[attr-defined]
    transport.get_pipe_transport(1).close()
    await process.wait()
    transport.close()


def _read(output: bytes, count: int) -> list[Result]:
    """The whole, well-formed lines of the output, as long as each is the next result."""
    results: list[Result] = []
    for line in output.split(b"\n")[:-1]:
        result = _result(line, len(results))
        if result is None or len(results) == count:
            break
        results.append(result)
    return results


def _result(line: bytes, index: int) -> Result | None:
    try:
        row: Any = json.loads(line)
        if row["index"] != index:
            return None
        return Result(None, str(row["error"])) if "error" in row else Result(Fraction(row["value"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
