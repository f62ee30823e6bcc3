"""What Socratic Self-Refine costs beside its calls: time, memory, and the published implementation on the same server.

    python benchmarks/reason_overhead.py [--official PATH] [--problems 200]

A simulated solver in a process of its own answers every request after 50 ms (part 1: also after others). Three parts:

1. overhead: SSR on many problems, 200 requests in flight, against the same work if nothing but the server took time:
   the recorded answers replayed on a clock that only waiting moves, each after the latency that the server really had.
   Beside it the same with all replies kept in a file, as `luthier eval` does, and the same requests sent bare with the
   same client library; and the processor time of a request of each and of that replay (ours alone);
2. memory: 1,000 problems of 12 steps in flight at once;
3. with --official, a checkout of SalesforceAIResearch/socratic-self-refine-reasoning: its SSR-Lin and ours on the same
   problems and the same server, M = 5 samples, R = 3, 30 problems and 100 calls at once: requests, generations, wall
   time, accuracy.

Rows carry the load average before each part: other work on the machine makes wall times longer, ours and theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from record import record

from luthier.core.errors import ConfigError
from luthier.llm.cache import CachedBackend
from luthier.llm.connections import collect_rarely, open_session
from luthier.llm.endpoint import Endpoint
from luthier.llm.stub_server import Faults, StubServer
from luthier.llm.types import Backend, Completion, Request, Score
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models
from luthier.reason.simulation import Chain, Habits, SimulatedSolver

LATENCY, IN_FLIGHT, MODEL = 0.05, 200, "gpt-4.1-nano"  # a name that the published code accepts
HABITS = Habits(error=0.1, judge_finds=1.0, judge_imagines=0.0)
_SAID: dict[tuple[str | int | None, ...], str] = {}


def free_reply(messages: Sequence[Mapping[str, str]], seed: int | None, index: int) -> str:
    """The same habits for requests in anybody's wording: what is asked for is told from numbers and layout alone."""
    asked, whole = messages[-1]["content"], "\n".join(message["content"] for message in messages)
    rng = random.Random(hashlib.sha256(f"{whole}{index}{random.random()}".encode()).digest())
    if "v0 =" not in whole:  # an equivalence: the first number, then references
        first, *references = re.findall(r"\d{3,}", asked)
        return f"<answer>{round(5 * references.count(first) / max(len(references), 1))}</answer>"
    chain = Chain.read(whole)

    def deviation() -> int:
        return rng.randrange(1, HABITS.variants + 1) if rng.random() < HABITS.error else 0

    stated = [int(value) for value in re.findall(r"v\d+ = (\d+) follows", whole)][: len(chain.steps)]
    if len(messages) == 3:  # a refinement: the last number is the hint for the step that was named last
        doubted = messages[1]["content"].rpartition("follows.")[2]
        step, hint = int(re.findall(r"What is v(\d+)\?", doubted)[-1]), int(re.findall(r"\d{3,}", doubted)[-1])
        deviations = chain.deviations(stated)
        deviations[step - 1] = (hint - chain.apply(step, stated[step - 2] if step > 1 else chain.first)) % 1_000_003
        return "<evaluation>Yes.</evaluation>" + _said(chain.follow(deviations))
    if '"sub-questions"' in asked:
        pairs = [{"description": f"What is v{t}?", "answer": value} for t, value in enumerate(stated, 1)]
        return json.dumps({"sub-questions": pairs})
    if messages[0]["role"] == "system" and (wanted := re.findall(r"What is v(\d+)\?", asked)) and not stated:
        index = int(wanted[-1])
        known = re.findall(rf"What is v{index - 1}\?.*?(\d\d+)", asked, re.DOTALL)  # with the answer stated for it
        before = int(known[-1]) if known else chain.first
        return f"<answer>{(chain.apply(index, before) + deviation()) % 1_000_003}</answer>"
    if messages[0]["role"] == "system":
        return f"<answer>{5 if str(stated[-1]) == chain.answer else 1}</answer>"
    return _said(chain.follow(chain.deviations(stated) if stated else [deviation() for _ in chain.steps]))


def reply(messages: Sequence[Mapping[str, str]], seed: int | None, index: int) -> str:
    """The simulated solver for our prompts, the same habits for other wording. What was said once is remembered, so
    that a run after the first one measures its client and not the simulation."""
    key = (*(message["content"] for message in messages), seed, index)
    if key not in _SAID:
        try:
            _SAID[key] = SimulatedSolver(HABITS).reply([dict(message) for message in messages], seed, index)
        except ConfigError:
            return free_reply(messages, seed, index)
    return _SAID[key]


def _said(values: Sequence[int]) -> str:
    return "\n".join([*(f"v{t} = {v} follows." for t, v in enumerate(values, 1)), f"<answer>{values[-1]}</answer>"])


def _serve(pipe: Any, latency: float) -> None:
    async def run() -> None:
        async with StubServer(reply, latency=latency, model=MODEL, faults=Faults()) as stub:
            pipe.send(stub.url)
            while True:
                await asyncio.to_thread(pipe.recv)
                pipe.send(vars(stub.ledger))

    asyncio.run(run())


@contextmanager
def server(latency: float = LATENCY) -> Any:
    """URL of a simulated solver in a process of its own, and a function that reads its ledger."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, latency), daemon=True)
    process.start()

    def ledger() -> dict[str, float]:
        ours.send("?")
        return dict(ours.recv())

    try:
        yield ours.recv(), ledger
    finally:
        process.terminate()
        process.join()


def _key(request: Request) -> str:
    return repr((request.messages, request.seed, request.first_sample, request.n))


class Recorder:
    """An endpoint whose requests and answers are kept."""

    def __init__(self, inner: Endpoint) -> None:
        self.inner, self.model, self.usage, self.bodies = inner, inner.model, inner.usage, list[bytes]()
        self.answers: dict[str, list[Completion]] = {}

    async def complete(self, request: Request) -> list[Completion]:
        body = self.inner.capabilities.body(request, first=request.first_sample, n=request.n)
        self.bodies.append(json.dumps(body).encode())
        answer = self.answers[_key(request)] = await self.inner.complete(request)
        return answer

    async def score(self, prompt: str, completion: str) -> Score:
        return await self.inner.score(prompt, completion)

    async def aclose(self) -> None:
        await self.inner.aclose()


class Replay(Recorder):
    """The recorded answers, each after `latency` seconds, `IN_FLIGHT` at once."""

    def __init__(self, recorder: Recorder, latency: float) -> None:
        super().__init__(recorder.inner)
        self.answers, self.latency, self.slots = recorder.answers, latency, asyncio.Semaphore(IN_FLIGHT)

    async def complete(self, request: Request) -> list[Completion]:
        async with self.slots:
            await asyncio.sleep(self.latency)
        return self.answers[_key(request)]


class Clock(selectors.DefaultSelector):
    """For an event loop in which only waiting takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += timeout or 0.0
        return super().select(0)


def ideal(recorder: Recorder, chains: Sequence[Chain], latency: float) -> dict[str, float]:
    """Seconds of the recorded work if only the server took time, and the processor time that it takes all the same."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        took = runner.run(ours(Replay(recorder, latency), chains, at_once=len(chains)))
        return {**took, "seconds": clock.now}


async def undecided(a: str, b: str) -> bool | None:
    return None


def endpoint(url: str, concurrency: int) -> Endpoint:
    return Endpoint(url, MODEL, concurrency=concurrency, timeout=600, connect_timeout=120)


async def ours(
    backend: Backend, chains: Sequence[Chain], *, at_once: int, method: str = "ssr:rounds=3,samples=5"
) -> dict[str, float]:
    """Solve all; seconds, CPU seconds and the share of right answers."""
    config, slots = parse_method(method), asyncio.Semaphore(at_once)

    async def one(number: int, chain: Chain) -> bool:
        async with slots:
            solution = await solve(chain.question, Models(backend), config, equivalence=undecided, seed=number)
        return solution.answer == chain.answer

    wall, cpu = time.perf_counter(), time.process_time()
    right = await asyncio.gather(*(one(number, chain) for number, chain in enumerate(chains)))
    took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "right": sum(right) / len(right)}
    await backend.aclose()
    return took


async def bare(url: str, bodies: Sequence[bytes]) -> dict[str, float]:
    """Send the same requests with nothing between them."""
    waiting, headers = iter(bodies), {"Content-Type": "application/json"}
    async with open_session(url, timeout=60, connect_timeout=60) as session:

        async def work() -> None:
            for body in waiting:
                async with session.post(f"{url}/chat/completions", data=body, headers=headers) as response:
                    json.loads(await response.read())

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def overhead(problems: int, repeats: int, steps: int, latency: float) -> dict[str, Any]:
    """Part 1."""
    chains, load = [Chain.draw(steps, number) for number in range(problems)], os.getloadavg()[0]
    kinds: dict[str, list[dict[str, float]]] = {"whole": [], "ideal": [], "bare": [], "kept": []}
    with server(latency) as (url, ledger), tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(endpoint(url, IN_FLIGHT))
        asyncio.run(ours(recorder, chains, at_once=problems))
        requests = len(recorder.bodies)
        for number in range(repeats):
            before = ledger()
            kinds["whole"].append(asyncio.run(ours(endpoint(url, IN_FLIGHT), chains, at_once=problems)))
            after = ledger()
            if (asked := after["requests"] - before["requests"]) != requests:
                raise SystemExit(f"{asked} requests, expected the {requests} of the first run")
            given = (after["seconds"] - before["seconds"]) / requests
            kinds["ideal"].append(ideal(recorder, chains, given) | {"latency": given})
            kinds["bare"].append(asyncio.run(bare(url, recorder.bodies)))
            kept = CachedBackend(endpoint(url, IN_FLIGHT), Path(folder) / f"{number}.sqlite")
            kinds["kept"].append(asyncio.run(ours(kept, chains, at_once=problems)))

    def all_of(kind: str, name: str) -> list[float]:
        return [row[name] for row in kinds[kind]]

    def cpu(kind: str) -> float:
        return round(1000 * statistics.median(all_of(kind, "cpu")) / requests, 3)

    shares = [
        1 - best / took for best, took in zip(all_of("ideal", "seconds"), all_of("whole", "seconds"), strict=True)
    ]
    return {
        "part": "overhead",
        "load": load,
        "problems": problems,
        "steps": steps,
        "requests": requests,
        "latency_ms": 1000 * latency,
        "most_in_flight": after["most_in_flight"],
        "server_ms": [round(1000 * value, 2) for value in all_of("ideal", "latency")],
        "seconds": [round(value, 2) for value in all_of("whole", "seconds")],
        "ideal_seconds": [round(value, 2) for value in all_of("ideal", "seconds")],
        "kept_seconds": [round(value, 2) for value in all_of("kept", "seconds")],
        "bare_seconds": [round(value, 2) for value in all_of("bare", "seconds")],
        "share_of_wall_time": [round(share, 4) for share in shares],
        "cpu_ms_per_request": {
            "whole": cpu("whole"),
            "ours alone": cpu("ideal"),
            "kept": cpu("kept"),
            "bare": cpu("bare"),
        },
    }


def memory(steps: int, problems: int = 1000) -> dict[str, Any]:
    """Part 2, in this process: call it in a fresh one."""
    chains, load = [Chain.draw(steps, number) for number in range(problems)], os.getloadavg()[0]
    with server() as (url, ledger):
        took = asyncio.run(ours(endpoint(url, problems), chains, at_once=problems))
        requests = ledger()["requests"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"requests": requests, "seconds": round(took["seconds"], 1), "peak_mib": round(peak, 1)}
    return {"part": "memory", "load": load, "problems_in_flight": problems, "steps": steps, **told}


async def official(url: str, chains: Sequence[Chain], path: str) -> dict[str, float]:
    """The published SSR-Lin as it stands; what it imports and does not need here is replaced by nothing."""
    for name in ("google", "google.auth", "google.auth.transport", "google.auth.transport.requests", "google.genai"):
        sys.modules[name] = MagicMock()
    sys.modules["google.auth"].default = lambda **_: (MagicMock(token="x"), None)  # type: ignore[attr-defined]
    for name in ("networkx", "pandas"):
        sys.modules.setdefault(name, MagicMock())
    keys = types.ModuleType("apikey")
    keys.url, keys.openai_api_key = url, ["x"]  # type: ignore[attr-defined]
    sys.modules["apikey"] = keys
    sys.path.insert(0, path)
    importlib.import_module("experiment.module_atomic").set_module("math")
    published = importlib.import_module("experiment.module_ssr").socratic_self_refine
    slots = asyncio.Semaphore(30)

    async def one(chain: Chain) -> bool:
        async with slots:
            result, _ = await published(model=MODEL, question=chain.question, max_iter=3)
        return str(result["answer"]) == chain.answer

    wall, cpu = time.perf_counter(), time.process_time()
    right = await asyncio.gather(*map(one, chains))
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "right": sum(right) / len(right)}


def side(name: str, problems: int, path: str) -> dict[str, Any]:
    """One side of part 3, in this process."""
    chains = [Chain.draw(6, number) for number in range(problems)]
    load = os.getloadavg()[0]
    with server() as (url, ledger):
        if name == "official":
            took = asyncio.run(official(url, chains, path))
        else:
            took = asyncio.run(ours(endpoint(url, 100), chains, at_once=30, method=name))
        counted = {name: ledger()[name] for name in ("requests", "completion_tokens")}
    return {"side": name, "load": load, **counted} | {key: round(value, 3) for key, value in took.items()}


def _fresh(*arguments: str) -> dict[str, Any]:
    """This file in a new process; its last line is the result."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", default="", help="checkout of the published implementation")
    parser.add_argument("--parts", nargs="*", default=["overhead", "memory", "side"], help="overhead, memory, side")
    parser.add_argument("--problems", type=int, default=200, help="of part 1; part 3 takes up to 60 of them")
    parser.add_argument("--steps", type=int, default=12, help="of a problem in parts 1 and 2; part 3 has 6")
    parser.add_argument("--latencies", nargs="*", type=float, default=[LATENCY, 0.5], help="of part 1, seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    parser.add_argument("--only", default="", help="for its own use: memory, or a side of part 3")
    options = parser.parse_args()
    if options.only:
        one = options.only
        part = memory(options.steps) if one == "memory" else side(one, options.problems, options.official)
        print(json.dumps(part))
        return
    keep = print if options.dry else lambda row: record("reason_overhead", **row)
    if "overhead" in options.parts:
        collect_rarely()  # as the command line does for endpoints
        for latency in options.latencies:
            keep(overhead(options.problems, options.repeats, options.steps, latency))
    if "memory" in options.parts:
        keep(_fresh("--only", "memory", "--steps", str(options.steps)))
    if "side" in options.parts and not options.official:
        print("side by side: left out (give --official PATH)")
    elif "side" in options.parts:
        keep(side_by_side(min(options.problems, 60), str(Path(options.official).resolve())))


def side_by_side(problems: int, path: str) -> dict[str, Any]:
    """Part 3: every side in a process of its own."""
    rows = [
        _fresh("--only", name, "--problems", str(problems), "--official", path)
        for name in ("official", "ssr-lin:rounds=3,samples=5", "ssr-lin:preset=paper,rounds=3,samples=5")
    ]
    theirs, mine, _ = rows
    names = ("requests", "completion_tokens", "seconds", "cpu")
    ratios = {key: round(mine[key] / theirs[key], 3) for key in names}
    return {"part": "side by side", "problems": problems, "rows": rows, "ours_over_theirs": ratios}


if __name__ == "__main__":
    main()
