"""The fifteen statistical checks of Socratic Self-Refine on a solver with known habits.

They show that the implementation is the algorithm; they say nothing about language models. Each check compares what
our code measures with a closed form, an independent simulation in numpy, or the published call counts; the tolerance
is four standard errors. Checks 12 and 14 go through HTTP. Ends with exit code 1 when a check fails.

    python benchmarks/reason_simulation.py            # 2,000 problems a cell, about ten minutes
    python benchmarks/reason_simulation.py --items 300 --only 5 12
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from record import record

from luthier.core.stats import mcnemar
from luthier.llm.endpoint import Endpoint
from luthier.llm.stub_server import Faults, StubServer
from luthier.llm.types import Backend
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import CheckedStep, Models, Solution
from luthier.reason.simulation import Chain, Habits, SimulatedSolver, chance_of_chain, guarded_patch, plurality
from luthier.tasks.metrics import auroc, reliability

Judgement = tuple[str, bool]


@dataclass(frozen=True)
class Cell:
    """One setting: problems of a length, habits, a method."""

    length: int
    method: str
    habits: Habits
    items: int
    first: int = 0
    """Number of the first problem: equal numbers are equal problems."""


def chains(cell: Cell) -> list[Chain]:
    return [Chain.draw(cell.length, cell.first + index) for index in range(cell.items)]


async def equal(a: str, b: str) -> bool:
    return a == b


async def solve_all(cell: Cell, backend: Backend, at_once: int = 1) -> list[Solution]:
    config, room = parse_method(cell.method), asyncio.Semaphore(at_once)

    async def one(index: int, chain: Chain) -> Solution:
        async with room:
            return await solve(chain.question, Models(backend), config, equivalence=equal, seed=cell.first + index)

    return list(await asyncio.gather(*(one(index, chain) for index, chain in enumerate(chains(cell)))))


def run_cell(cell: Cell) -> list[Solution]:
    """All solutions of a cell, with the simulated solver in this process."""
    return asyncio.run(solve_all(cell, SimulatedSolver(cell.habits)))


def right(cell: Cell, solutions: Sequence[Solution]) -> list[bool]:
    return [s.answer == chain.answer for s, chain in zip(solutions, chains(cell), strict=True)]


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def error(p: float, n: int) -> float:
    """Four standard errors of a proportion near p."""
    return 4 * math.sqrt(max(p * (1 - p), 1 / n) / n)


def near(what: str, measured: float, expected: float, n: int, slack: float = 0.0) -> Judgement:
    room = error(expected, n) + slack
    return f"{what}: {measured:.3f}, expected {expected:.3f} +- {room:.3f} (n={n})", abs(measured - expected) <= room


def at_least(what: str, measured: float, least: float, n: int) -> Judgement:
    return f"{what}: {measured:.3f}, expected >= {least:.3f} - {error(least, n):.3f} (n={n})", (
        measured >= least - error(least, n)
    )


class Runs:
    """Solutions of cells, computed once each; all cells of a check in parallel."""

    def __init__(self, items: int, pool: ProcessPoolExecutor) -> None:
        self.items = items
        self._pool = pool
        self._known: dict[Cell, list[Solution]] = {}

    def cell(self, length: int, method: str, *, items: int | None = None, **habits: Any) -> Cell:
        return Cell(length, method, Habits(**habits), items or self.items)

    def of(self, *cells: Cell) -> list[list[Solution]]:
        missing = [cell for cell in dict.fromkeys(cells) if cell not in self._known]
        for cell, solutions in zip(missing, self._pool.map(run_cell, missing), strict=True):
            self._known[cell] = solutions
        return [self._known[cell] for cell in cells]

    def accuracy(self, *cells: Cell) -> list[float]:
        return [share(right(cell, solutions)) for cell, solutions in zip(cells, self.of(*cells), strict=True)]


def first_checks(cell: Cell, solutions: Sequence[Solution]) -> list[list[tuple[CheckedStep, bool]]]:
    """The steps of each first solution, with whether the step follows from what is stated before it."""
    checked = []
    for chain, solution in zip(chains(cell), solutions, strict=True):
        steps = solution.rounds[0].steps
        deviations = chain.deviations([int(step.step.answer) for step in steps])
        checked.append([(step, deviation == 0) for step, deviation in zip(steps, deviations, strict=True)])
    return checked


ALL_SAMPLES = "early_decision=false,min_votes=1"


def check_1(runs: Runs) -> list[Judgement]:
    """One chain of thought is right with probability (1 - e)^T."""
    cells = [runs.cell(length, "cot", error=e) for length in (2, 6, 12) for e in (0.05, 0.1, 0.2)]
    return [
        near(f"T={c.length} e={c.habits.error}", a, chance_of_chain(c.length, c.habits), c.items)
        for c, a in zip(cells, runs.accuracy(*cells), strict=True)
    ]


def check_2(runs: Runs) -> list[Judgement]:
    """Re-answers match a right step with 1 - e, a wrong one with e / W."""
    cell = runs.cell(6, f"ssr:{ALL_SAMPLES},rounds=1", error=0.2)
    pairs = [pair for one in first_checks(cell, runs.of(cell)[0]) for pair in one]
    matches = {ok: [step.confidence or 0.0 for step, good in pairs if good == ok] for ok in (True, False)}
    return [
        near(name, float(np.mean(matches[ok])), expected, 5 * len(matches[ok]))
        for name, ok, expected in (("right steps", True, 0.8), ("wrong steps", False, 0.2 / 8))
    ]


def check_3(runs: Runs) -> list[Judgement]:
    """The majority of M re-answers is right with probability q_M."""
    cells = {m: runs.cell(6, f"ssr:{ALL_SAMPLES},rounds=1,samples={m}", error=0.3) for m in (1, 3, 5, 9)}
    judgements = []
    for (samples, cell), solutions in zip(cells.items(), runs.of(*cells.values()), strict=True):
        hits = []
        for chain, solution in zip(chains(cell), solutions, strict=True):
            values = [int(step.step.answer) for step in solution.rounds[0].steps]
            before = [chain.first, *values]
            truth = [str(chain.apply(i, before[i - 1])) for i in range(1, len(values) + 1)]
            hits += [s.majority == t for s, t in zip(solution.rounds[0].steps, truth, strict=True)]
        judgements.append(near(f"M={samples}", share(hits), plurality(samples, 0.3, 8), len(hits)))
    return judgements


def check_4(runs: Runs) -> list[Judgement]:
    """The least confident step of a wrong chain is a wrong one (earliest of equals)."""
    published = {(6, 0.1): {1: 0.80, 3: 0.995, 5: 1.0}, (12, 0.2): {1: 0.59, 3: 0.967, 5: 0.998}}
    judgements = []
    for (length, e), by_samples in published.items():
        for samples, least in by_samples.items():
            cell = runs.cell(length, f"ssr:{ALL_SAMPLES},rounds=1,samples={samples}", error=e)
            wrong = [one for one in first_checks(cell, runs.of(cell)[0]) if not all(good for _, good in one)]
            hits = [not min(one, key=lambda pair: pair[0].confidence or 0.0)[1] for one in wrong]
            judgements.append(at_least(f"T={length} e={e} M={samples}", share(hits), least, len(hits)))
    return judgements


def check_5(runs: Runs) -> list[Judgement]:
    """Patch with guard, one step a round, equals its formula for K = 1 to 4 rounds."""
    cells = {k: runs.cell(6, f"ssr:{ALL_SAMPLES},fix=first,rounds={k}", error=0.2) for k in (1, 2, 3, 4)}
    q = plurality(5, 0.2, 8)
    values = runs.accuracy(*cells.values())
    # The formula takes the guard to be faultless: a slack for what a wrong majority disturbs.
    return [
        near(f"K={k}", value, guarded_patch(6, k, 0.2, q), runs.items, slack=0.02)
        for k, value in zip(cells, values, strict=True)
    ]


def check_6(runs: Runs) -> list[Judgement]:
    """With the guard more rounds never hurt; as published, accuracy stays on its plateau."""
    guarded = [runs.cell(6, f"ssr:fix=first,rounds={k}", error=0.2, downstream="regenerate") for k in (0, 1, 2, 3, 4)]
    values = runs.accuracy(*guarded)
    rising = all(later >= sooner - error(0.5, runs.items) for sooner, later in itertools.pairwise(values))
    plateau = {
        (6, 0.1): 0.743,
        (12, 0.2): 0.37,
    }
    judgements = [("guarded, 0 to 4 rounds: " + ", ".join(f"{value:.3f}" for value in values), rising)]
    for (length, e), expected in plateau.items():
        cell = runs.cell(length, "ssr-lin:preset=paper,rounds=2", error=e, downstream="regenerate")
        judgements.append(near(f"published, T={length} e={e}", runs.accuracy(cell)[0], expected, runs.items))
    return judgements


def mended_step(e: float, variants: int, samples: int, draws: int = 400_000) -> float:
    """Probability that a step is right after our rule, simulated on its own: replace what 2 votes or more outvote."""
    rng = np.random.default_rng(0)

    def draw(size: tuple[int, ...]) -> np.ndarray:
        wrong = rng.random(size) < e
        return np.where(wrong, rng.integers(1, variants + 1, size), 0)

    stated, answers = draw((draws,)), draw((draws, samples))
    counts = (answers[:, :, None] == np.arange(variants + 1)).sum(1)
    first = np.where(counts > 0, (answers[:, :, None] == np.arange(variants + 1)).argmax(1), samples)
    leader = (counts * 100 - first).argmax(1)  # most votes, then first seen
    lead, own = counts[np.arange(draws), leader], counts[np.arange(draws), stated]
    final = np.where((lead > own) & (lead >= 2), leader, stated)
    return float((final == 0).mean())


def check_7(runs: Runs) -> list[Judgement]:
    """All doubted steps mended in one pass: the chance of a step, to the power of T."""
    cells = [runs.cell(t, "ssr:early_decision=false,rounds=1", error=e) for t, e in ((6, 0.1), (12, 0.2), (20, 0.15))]
    judgements = []
    for cell, value in zip(cells, runs.accuracy(*cells), strict=True):
        step, bare = mended_step(cell.habits.error, 8, 5), plurality(5, cell.habits.error, 8)
        what = f"T={cell.length} e={cell.habits.error}"
        judgements.append(near(what, value, step**cell.length, cell.items))
        judgements.append(at_least(f"{what}, against q^T", value, bare**cell.length, cell.items))
    return judgements


def check_8(runs: Runs) -> list[Judgement]:
    """Null: re-answers that know nothing, and hints that are random, gain nothing."""
    cells = [
        runs.cell(6, "ssr", error=0.1, blind=True),
        runs.cell(6, f"ssr:{ALL_SAMPLES},samples=1,fix=first", error=0.1, blind=True, downstream="regenerate"),
    ]
    guarded, forced = runs.accuracy(*cells)
    base = chance_of_chain(6, cells[0].habits)
    gained = f"random hints forced in: {forced:.3f}, expected <= {base:.3f}"
    return [near("guarded", guarded, base, runs.items), (gained, forced <= base + error(base, runs.items))]


def check_9(runs: Runs) -> list[Judgement]:
    """Leak: against shuffled right answers accuracy falls to chance while the output stays the same."""
    cell = runs.cell(6, "ssr", error=0.1)
    solutions = runs.of(cell)[0]
    again = run_cell(cell)
    golds = [chain.answer for chain in chains(cell)]
    shuffled = golds[1:] + golds[:1]
    chance = share([s.answer == gold for s, gold in zip(again, shuffled, strict=True)])
    same = [replace(s, seconds=0) for s in solutions] == [replace(s, seconds=0) for s in again]
    return [
        (f"right {share(right(cell, solutions)):.3f}, against shuffled answers {chance:.3f}", chance < 0.01),
        (f"outputs identical: {same}", same),
    ]


def check_10(runs: Runs) -> list[Judgement]:
    """Traps: what went wrong only by traps is mended while s < (1 - e) / (2 - e), and not above."""
    strengths = (0.2, 0.3, 0.4, 0.55, 0.7, 0.8)
    cells = [
        runs.cell(6, "ssr:samples=25,early_decision=false", error=0.1, trap=0.15, trap_strength=s) for s in strengths
    ]
    judgements = []
    for cell, solutions in zip(cells, runs.of(*cells), strict=True):
        hits = []
        for one, good in zip(first_checks(cell, solutions), right(cell, solutions), strict=True):
            wrong = [step for step, fine in one if not fine]
            if wrong and all((step.confidence or 0) > 0.1 for step in wrong):  # a chance error hardly comes back
                hits.append(good)
        s = cell.habits.trap_strength
        value = share(hits) if hits else 0.0
        below = s < 0.9 / 1.9
        judgements.append((f"s={s}: mended {value:.3f} of {len(hits)}", value > 0.4 if below else value < 0.35))
    return judgements


def check_11(runs: Runs) -> list[Judgement]:
    """Calls of SSR-Ada with a judge that always or never flags, as published; SSR-Lin in between."""
    few = min(runs.items, 50)
    flagged = runs.cell(4, "ssr-ada:preset=paper", items=few, error=0.0, judge_imagines=1.0)
    never = runs.cell(4, "ssr-ada:preset=paper", items=few, error=0.0, judge_imagines=0.0)
    lin = runs.cell(4, "ssr-lin:preset=paper", items=few, error=0.95)
    calls = [{s.usage.calls for s in solutions} for solutions in runs.of(flagged, never, lin)]
    return [
        (f"always flagged: {calls[0]}, expected 10", calls[0] == {10}),
        (f"SSR-Lin: {max(calls[2])}, expected 50 = 1 + 5 * 9 + 4", max(calls[2]) == 50),
        (f"never flagged: {calls[1]}, expected >= SSR-Lin", min(calls[1]) >= 50),
    ]


async def over_http(cell: Cell, faults: Faults, retries: int = 60) -> tuple[list[Solution], StubServer]:
    solver = SimulatedSolver(cell.habits)
    async with StubServer(solver.reply, faults=faults) as server:
        endpoint = Endpoint(server.url, "stub", concurrency=64, max_retries=retries, sleep=_soon)
        try:
            return await solve_all(cell, endpoint, at_once=64), server
        finally:
            await endpoint.aclose()


async def _soon(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.002))


def check_12(runs: Runs) -> list[Judgement]:
    """Faults: with 20 % transport errors every answer is the one without them, and no placeholder is one."""
    cell = runs.cell(6, "ssr", items=min(runs.items, 300), error=0.1)
    plain = runs.of(cell)[0]
    judgements = []
    for name, faults in (
        ("20 % dropped connections", Faults(dropped=0.2)),
        ("10 % 500, 10 % 429", Faults(errors=0.1, limited=0.1)),
        ("no n", Faults(one_choice=True)),
    ):
        solutions, server = asyncio.run(over_http(cell, faults))
        same = [s.answer for s in solutions] == [s.answer for s in plain]
        what = f"{name}: {server.ledger.requests} requests for {server.ledger.answered} answers"
        if faults.one_choice:  # single samples are not the ones of a whole request at this server
            judgements.append(near(what, share(right(cell, solutions)), share(right(cell, plain)), cell.items))
        else:
            judgements.append((f"{what}, same answers: {same}", same))
    return judgements


def check_13(runs: Runs) -> list[Judgement]:
    """Paired test against the majority at equal generated tokens, on short and on long chains."""
    judgements = []
    for length, e, long in ((6, 0.2, False), (20, 0.15, True)):
        habits: dict[str, Any] = {"error": e, "downstream": "regenerate"}
        cot, ssr = runs.cell(length, "cot", **habits), runs.cell(length, "ssr-lin:fix=first", **habits)
        ours = runs.cell(length, "ssr", **habits)
        tokens = [float(np.mean([s.usage.completion_tokens for s in some])) for some in runs.of(cot, ours)]
        k = round(tokens[1] / tokens[0])
        maj = runs.cell(length, f"maj@{k}", **habits)
        a, b = (right(cell, some) for cell, some in zip((ours, maj), runs.of(ours, maj), strict=True))
        test = mcnemar(a, b)
        what = f"T={length} e={e}: ssr {share(a):.3f}, one fix a round {runs.accuracy(ssr)[0]:.3f}"
        only = f"only ssr {test.only_first}, only maj {test.only_second}, p={test.p:.2g}"
        won = test.only_first > test.only_second and test.p < 0.05
        judgements.append((f"{what}, maj@{k} {share(b):.3f}; {only}", won or not long))
    return judgements


def check_14(runs: Runs) -> list[Judgement]:
    """What the solutions say they cost is what the server delivered, with and without faults."""
    cell = runs.cell(6, "ssr", items=min(runs.items, 200), error=0.2)
    judgements = []
    for faults in (Faults(), Faults(errors=0.1, limited=0.1, dropped=0.1)):
        solutions, server = asyncio.run(over_http(cell, faults))
        paid = [
            sum(getattr(s.usage, name) for s in solutions) for name in ("prompt_tokens", "completion_tokens", "calls")
        ]
        told = [server.ledger.prompt_tokens, server.ledger.completion_tokens, server.ledger.answered]
        judgements.append((f"prompt, generated, calls: ours {paid}, server {told}", paid == told))
    return judgements


def check_15(runs: Runs) -> list[Judgement]:
    """Calibration of step confidence against the truth."""
    cell = runs.cell(12, f"ssr:{ALL_SAMPLES},rounds=1", error=0.2)
    pairs = [pair for one in first_checks(cell, runs.of(cell)[0]) for pair in one]
    scores, labels = [step.confidence or 0.0 for step, _ in pairs], [good for _, good in pairs]
    area = auroc(scores, labels) or 0.0
    curve = ", ".join(f"{b.confidence:.2f}: {b.accuracy.value:.3f}" for b in reliability(scores, labels, bins=6))
    return [(f"AUROC {area:.4f} over {len(pairs)} steps; right at confidence {curve}", area > 0.99)]


CHECKS: list[Callable[[Runs], list[Judgement]]] = [
    check_1, check_2, check_3, check_4, check_5, check_6, check_7, check_8,
    check_9, check_10, check_11, check_12, check_13, check_14, check_15,
]  # fmt: skip


def table(runs: Runs) -> list[str]:
    """The reference table: accuracy by method (rows: chains)."""
    lines = ["T   e    h    s    cot   maj@5 self-refine published guard first/regen first/patch all, 1 pass maj@23"]
    for length, e, h, s in ((6, 0.1, 0, 0), (6, 0.2, 0, 0), (6, 0.3, 0, 0), (12, 0.2, 0, 0), (20, 0.15, 0, 0),
                            (6, 0.1, 0.15, 0.4), (6, 0.1, 0.15, 0.7)):  # fmt: skip
        base: dict[str, Any] = {"error": e, "trap": h, "trap_strength": s}
        again: dict[str, Any] = {**base, "downstream": "regenerate"}
        cells = [
            runs.cell(length, "cot", **base),
            runs.cell(length, "maj@5", **base),
            runs.cell(length, "self-refine:reference_compat=true", **base),
            runs.cell(length, "ssr-lin:preset=paper,rounds=2", **again),
            runs.cell(length, "ssr:fix=first", **again),
            runs.cell(length, "ssr:fix=first", **base),
            runs.cell(length, "ssr:rounds=1", **base),
            runs.cell(length, "maj@23", **base),
        ]
        values = "  ".join(f"{value:.3f}" for value in runs.accuracy(*cells))
        lines.append(f"{length:<3} {e:<4} {h:<4} {s:<4} {values}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000, help="problems in each cell")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of checks; 0 is the reference table")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    began, failed, passed = time.monotonic(), [], 0
    with ProcessPoolExecutor(arguments.workers) as pool:
        runs = Runs(arguments.items, pool)
        for number, check in enumerate(CHECKS, 1):
            if arguments.only and number not in arguments.only:
                continue
            print(f"{number}. {check.__doc__}")
            for text, fine in check(runs):
                print(f"   {'ok  ' if fine else 'FAIL'} {text}", flush=True)
                passed += fine
                failed += [] if fine else [f"{number}: {text}"]
        if not arguments.only or 0 in arguments.only:
            print("\n".join(table(runs)), flush=True)
    if not arguments.only:
        record(
            "reason_simulation",
            items=arguments.items,
            passed=passed,
            failed=failed,
            seconds=round(time.monotonic() - began, 1),
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
