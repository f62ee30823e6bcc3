"""`luthier solve`: answer a question, check the steps, mend what is outvoted, and show all of it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from luthier.cli.models import open_model, open_role, read_budget
from luthier.cli.solve_view import LiveView
from luthier.core.console import Console
from luthier.core.errors import ConfigError
from luthier.llm.prices import Prices
from luthier.reason.config import ReasonConfig
from luthier.reason.methods import parse_method, solve
from luthier.reason.session import Models, Solution
from luthier.reason.trace import Trace, TraceFile
from luthier.tasks.grading import Grader


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """Answer a question with a language model and check the steps of the answer."""

    question: tyro.conf.Positional[str]
    """The question; - reads it from standard input."""
    model: str
    """Model folder or hub id; with --endpoint, the model's name on that server."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server (OPENAI_API_KEY is used if set); by default the model runs in this process."""
    method: str = "ssr"
    """ssr, ssr-lin, ssr-ada, ssr-plan, cot, maj@16, best-of-n, self-refine, debate, atom or mctsr, with settings after
    a colon: ssr-plan:rounds=5,samples=3 or ssr-lin:preset=paper."""
    role: tuple[str, ...] = ()
    """Other models for some calls: judge=NAME@URL; the roles are solve, decompose, step, judge, refine and plan."""
    budget: tuple[str, ...] = ()
    """Limits: calls=40, tokens=20000, seconds=60. When one is reached, the best answer so far counts."""
    prices: Path | None = None
    """YAML file with dollars per million tokens, by model: NAME: {input: 0.05, output: 0.2}."""
    system: str | None = None
    """System message before the question."""
    trace: Path | None = None
    """Append everything that happened to this .jsonl file; `luthier report FILE` shows it."""
    seed: int = 0
    """Equal seeds give equal requests."""
    device: str = "auto"
    """Where a model in this process runs: cpu, cuda, ...; auto takes a GPU when there is one."""


def run(config: SolveConfig, console: Console) -> None:
    """Solve, with a live view of the steps; then print the solution and the answer."""
    question = sys.stdin.read().strip() if config.question == "-" else config.question.strip()
    if not question:
        raise ConfigError("there is nothing to solve: the question is empty", hint="give it in quotes")
    settings = settings_of(config)
    solution = asyncio.run(_solve(question, settings, config, console))
    console.print(solution.text)
    console.print()
    console.print(f"answer: {'none found' if solution.answer is None else solution.answer}")
    console.status(_account(solution))
    console.result(_result(solution))


def settings_of(config: SolveConfig) -> ReasonConfig:
    """The method with its settings, and the budgets. Raises: ConfigError."""
    settings = replace(parse_method(config.method), **read_budget(config.budget))
    if settings.max_cost is not None and config.prices is None:
        raise ConfigError("budget: dollars need prices", hint="add --prices FILE, or limit tokens instead")
    return settings


async def _solve(question: str, settings: ReasonConfig, config: SolveConfig, console: Console) -> Solution:
    head = [] if config.system is None else [{"role": "system", "content": config.system}]
    with contextlib.ExitStack() as stack:
        listeners: list[Any] = [] if console.as_json else [stack.enter_context(LiveView(console))]
        if config.trace is not None:
            listeners.append(stack.enter_context(contextlib.closing(TraceFile(config.trace))))
        price = Prices.read(config.prices).cost if config.prices else None
        backend = open_model(config.model, endpoint=config.endpoint, device=config.device)
        roles = dict(open_role(text) for text in config.role)
        try:
            async with Grader() as grader:
                return await solve(
                    [*head, {"role": "user", "content": question}],
                    Models(backend, roles, price),
                    settings,
                    equivalence=grader.equivalent,
                    trace=Trace("question", tuple(listeners)),
                    seed=config.seed,
                )
        finally:
            for one in (backend, *roles.values()):
                await one.aclose()


def _account(solution: Solution) -> str:
    usage = solution.usage
    parts = [
        f"stopped: {solution.stop}",
        f"{usage.calls} calls",
        f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens",
        f"{solution.seconds:.1f} s",
    ]
    doubtful = [str(number) for number, step in enumerate(solution.steps, 1) if not step.agrees]
    if solution.steps:
        parts.insert(1, f"{len(solution.steps) - len(doubtful)} of {len(solution.steps)} steps confirmed")
    return "\n".join([", ".join(parts), *(f"note: {flag}" for flag in solution.flags)])


def _result(solution: Solution) -> dict[str, Any]:
    return {
        "answer": solution.answer,
        "text": solution.text,
        "stop": solution.stop,
        "steps": [step.to_json(index) for index, step in enumerate(solution.steps)],
        "rounds": [{"round": p.round, "answer": p.answer, "confidence": p.confidence} for p in solution.rounds],
        "calls": solution.usage.calls,
        "prompt_tokens": solution.usage.prompt_tokens,
        "completion_tokens": solution.usage.completion_tokens,
        "cost": solution.cost,
        "flags": list(solution.flags),
        "seconds": solution.seconds,
    }
