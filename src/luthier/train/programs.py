"""Synthetic problems that a program verifies (arXiv 2511.10628): name, program, verify, change, retell, read, solve.

Departures from the published loop, each against a weakness found in it: numbers are tied to their places in the
question and only those change; programs run exactly, on fractions, and nothing is rounded before a comparison; new
values keep their sign and size; a retold problem is read again and every number must have its old role; one record
holds all that belongs to one new problem, so that no answer can slip to another question or round; and all that a model
is asked has a key of its own (text, seed and sample index), so that parallel and repeated runs cannot mix.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

from luthier.core.errors import EndpointError
from luthier.core.files import append_jsonl, read_jsonl, sha256_bytes
from luthier.core.seeds import derive_seed
from luthier.llm.budget import BudgetSpent
from luthier.llm.types import Backend, Completion, Message, Request
from luthier.tasks.answers import final_text, number
from luthier.tasks.task import Problem
from luthier.train import program_prompts as prompts
from luthier.train.program_config import ProgramsConfig
from luthier.train.program_numbers import (
    Number,
    decimal_places,
    find_numbers,
    last_number,
    number_words,
    write_answer,
)
from luthier.train.program_records import Outcome, Sample, digest_parts, question_key
from luthier.train.program_source import Program, Refused, read_program
from luthier.train.program_values import Parameter, draw_values, fits, with_values
from luthier.train.sandbox import Result, Sandbox

DRAWS = 8
"""Drawn values that are calculated for each that is wanted."""
_ROUNDING = re.compile(r"\b(?:round|nearest)", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A problem with its known answer, its numbers, and the program that calculates the one from the others."""

    question: str
    gold: Fraction
    parameters: tuple[Parameter, ...]
    program: Program

    @property
    def old(self) -> dict[str, Fraction]:
        """The values that the parameters have in the question."""
        return {p.name: p.number.value for p in self.parameters}


class ProgramMaker:
    """Makes new problems from given ones.

    `kept_out(text)` says why a text must not be used, empty when it may. `problems`: all given problems, which no new
    one may equal. `spent` says so once a budget is spent; empty before.
    """

    def __init__(
        self,
        backend: Backend,
        sandbox: Sandbox,
        config: ProgramsConfig,
        problems: Sequence[Problem],
        *,
        kept_out: Callable[[str], str] = lambda text: "",
    ) -> None:
        self._backend = backend
        self._sandbox = sandbox
        self._config = config
        self._kept_out = kept_out
        self.spent = ""
        self._first: dict[str, str] = {}
        for problem in problems:
            self._first.setdefault(question_key(problem.prompt), problem.id)

    async def make(self, problem: Problem, digest: str = "") -> Outcome:
        """What becomes of a problem. A failing model or a spent budget ends it early and is noted in the outcome."""
        outcome = Outcome(problem.id, digest)
        try:
            found = await self._find(problem, outcome)
            if found is not None:
                await self._rounds(found, outcome)
        except EndpointError as error:
            outcome.failure = str(error)
            if isinstance(error, BudgetSpent):
                self.spent = outcome.failure
        return outcome

    # Naming and programs: until a program gives the known answer.

    async def _find(self, problem: Problem, outcome: Outcome) -> Found | None:
        numbers, gold = find_numbers(problem.prompt), number(problem.answer)
        if (reason := self._unusable(problem, gold, numbers)) or gold is None:
            outcome.stop("question", reason)
            return None
        gate, reason = "naming", ""
        for naming in range(self._config.abstractions):
            outcome.namings += 1
            parameters = prompts.read_names(await self._ask(prompts.abstract(problem.prompt), sample=naming), numbers)
            if isinstance(parameters, str):
                reason = parameters if gate == "naming" else reason
                continue
            gate = "program"
            for attempt in range(self._config.programs):
                outcome.programs += 1
                sample = naming * self._config.programs + attempt
                found = await self._try_program(problem, gold, parameters, sample)
                if isinstance(found, Found):
                    outcome.program = found.program.source
                    outcome.values = {name: str(value) for name, value in found.old.items()}
                    return found
                reason = found
        outcome.stop(gate, reason)
        return None

    def _unusable(self, problem: Problem, gold: Fraction | None, numbers: Sequence[Number]) -> str:
        if gold is None:
            return "the answer is no number"
        if not numbers:
            return "no numbers in the question"
        if self._first.get(question_key(problem.prompt), problem.id) != problem.id:
            return "the same question stands before it"
        return self._kept_out(problem.prompt)

    async def _try_program(
        self, problem: Problem, gold: Fraction, parameters: Sequence[Parameter], sample: int
    ) -> Found | str:
        """The problem with a program that gives its answer exactly; a string says what is wrong."""
        seed = derive_seed(self._config.seed, "examples", problem.id, sample)
        reply = await self._ask(prompts.program(problem.prompt, parameters, seed), sample=sample)
        try:
            program = read_program(reply, [p.name for p in parameters])
        except Refused as error:
            return str(error)
        found = Found(problem.prompt, gold, tuple(parameters), program)
        (result,) = await self._run(found, [found.old])
        if result.value is None:
            return result.error
        if result.value != gold:
            return f"another answer: {write_answer(result.value)}, expected {write_answer(gold)}"
        return found

    async def _run(self, found: Found, values: Sequence[Mapping[str, Fraction]]) -> list[Result]:
        may_round = bool(_ROUNDING.search(found.question))
        return await self._sandbox.run(found.program.exact, found.program.name, values, may_round=may_round)

    # Rounds: new values, retold, read again, solved.

    async def _rounds(self, found: Found, outcome: Outcome) -> None:
        seen_values = {tuple(found.old.values())}
        seen_questions = set(self._first)
        for round_ in range(self._config.rounds):
            wanted = min(self._config.variants, self._config.cap - len(outcome.accepted))
            if wanted <= 0:
                return
            samples = await self._new_values(found, round_, wanted, seen_values, outcome)
            outcome.samples += samples
            for sample in samples:
                _check_values(found, sample, seen_values)
            await self._calculate(found, _alive(samples))
            await _each(_alive(samples), lambda sample: self._retell(found, sample))
            for sample in _alive(samples):
                _check_new(sample, seen_questions)
            await _each(_alive(samples), lambda sample: self._read(found, sample))
            await _each(_alive(samples), self._solve)

    async def _new_values(
        self, found: Found, round_: int, wanted: int, seen: set[tuple[Fraction, ...]], outcome: Outcome
    ) -> list[Sample]:
        """Fresh records with new values, checked by nobody yet."""
        if self._config.values == "draw":
            drawn = await self._draw(found, round_, wanted, seen, outcome.problem)
            return [Sample(round_, index, one) for index, one in enumerate(drawn)]
        reply = await self._ask(prompts.values(found.question, found.parameters), sample=round_)
        samples = []
        lines = prompts.read_values(reply, found.parameters) or ["no line of values"]
        for index, one in enumerate(lines[:wanted]):
            sample = Sample(round_, index, {} if isinstance(one, str) else one)
            if isinstance(one, str):
                sample.stop("values", f"unreadable: {one}")
            samples.append(sample)
        return samples

    async def _draw(
        self, found: Found, round_: int, wanted: int, seen: set[tuple[Fraction, ...]], problem: str
    ) -> list[dict[str, Fraction]]:
        """Drawn values; those with a fitting answer, where there are any."""
        seed = derive_seed(self._config.seed, "values", problem, round_)
        fresh = (one for one in draw_values(found.parameters, seed) if tuple(one.values()) not in seen)
        drawn = list(islice(fresh, DRAWS * wanted))
        results = await self._run(found, drawn)
        good = [v for v, r in zip(drawn, results, strict=True) if r.value is not None and not _unfit(found, r.value)]
        return (good or drawn)[:wanted]

    async def _calculate(self, found: Found, samples: Sequence[Sample]) -> None:
        results = await self._run(found, [sample.values for sample in samples])
        for sample, result in zip(samples, results, strict=True):
            if result.value is None:
                sample.stop("calculation", result.error)
                continue
            sample.answer = result.value
            if reason := _unfit(found, result.value):
                sample.stop("calculation", reason)

    async def _retell(self, found: Found, sample: Sample) -> None:
        draft = with_values(found.question, found.parameters, sample.values)
        reply = await self._ask(prompts.reword(draft), temperature=0.0)
        question = prompts.read_question(reply)
        if question is None:
            sample.stop("retelling", "no question in the reply")
            return
        sample.question = question
        numbers, expected = find_numbers(question), find_numbers(draft)
        if len(numbers) != len(expected):
            sample.stop("retelling", f"more or fewer numbers: {len(numbers)}, expected {len(expected)}")
        elif sorted(n.value for n in numbers) != sorted(n.value for n in expected):
            sample.stop("retelling", "other numbers")
        elif number_words(question) != number_words(draft):
            sample.stop("retelling", "other number words")
        elif len(question) > 3 * len(draft) + 100:
            sample.stop("retelling", "much longer")
        elif reason := self._kept_out(question):
            sample.stop("retelling", reason)

    async def _read(self, found: Found, sample: Sample) -> None:
        asked = prompts.read(found.question, found.parameters, sample.question)
        reading = prompts.read_reading(await self._ask(asked, temperature=0.0), find_numbers(sample.question))
        if isinstance(reading, str):
            sample.stop("reading", f"unreadable: {reading}")
        elif set(reading) != set(sample.values):
            sample.stop("reading", f"other parameters: {', '.join(reading)[:80]}")
        elif reading != sample.values:
            sample.stop("reading", "numbers in other roles")

    async def _solve(self, sample: Sample) -> None:
        reason = ""
        for attempt in range(self._config.passes):
            completion = await self._complete(prompts.solve(sample.question), attempt, self._config.temperature)
            solution = final_text(completion.text).strip()
            answer = last_number(solution)
            if completion.finish_reason != "stop":
                reason = f"not finished: {completion.finish_reason}"
            elif answer is not None and answer == sample.answer:
                sample.solution = solution
                return
            else:
                reason = f"another answer: {'none' if answer is None else write_answer(answer)}"
        sample.stop("solution", reason)

    async def _ask(self, messages: Sequence[Message], *, sample: int = 0, temperature: float | None = None) -> str:
        how = self._config.temperature if temperature is None else temperature
        return final_text((await self._complete(messages, sample, how)).text)

    async def _complete(self, messages: Sequence[Message], sample: int, temperature: float) -> Completion:
        request = Request(
            messages=messages,
            first_sample=sample,
            temperature=temperature,
            max_tokens=self._config.max_tokens,
            seed=derive_seed(self._config.seed, "programs") & 0x7FFFFFFF,  # servers take 31 bits
        )
        return (await self._backend.complete(request))[0]


async def make_all(
    maker: ProgramMaker,
    problems: Sequence[Problem],
    path: Path,
    *,
    identity: str = "",
    at_once: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """The outcomes of all problems, in order; finished ones are appended to `path` and not made again.

    `identity`: what else the records depend on. Once a budget is spent, no further problem is begun. Cancelling keeps
    what is finished.
    """
    digests = {problem.id: _digest(problem, identity) for problem in problems}
    rows = {row["problem"]: row for row in read_jsonl(path)}
    outcomes = {
        problem.id: Outcome.from_json(row)
        for problem in problems
        if (row := rows.get(problem.id)) is not None and row["digest"] == digests[problem.id]
    }
    for _ in outcomes:
        advance()
    waiting = iter([problem for problem in problems if problem.id not in outcomes])

    async def work() -> None:
        for problem in waiting:
            digest = digests[problem.id]
            if maker.spent:
                outcome = Outcome(problem.id, digest, failure=maker.spent)
            else:
                outcome = await maker.make(problem, digest)
            if not outcome.failure:
                append_jsonl(path, outcome.to_json())
            outcomes[problem.id] = outcome
            advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(problems))):
                group.create_task(work())
    except ExceptionGroup as failed:  # a setting that no problem can do with: one of them says so
        raise failed.exceptions[0] from None
    return [outcomes[problem.id] for problem in problems]


def _digest(problem: Problem, identity: str) -> str:
    parts = [prompts.VERSION, identity, *digest_parts(problem)]
    return sha256_bytes(json.dumps(parts, ensure_ascii=True).encode())[:16]


async def _each(samples: Sequence[Sample], step: Callable[[Sample], Awaitable[None]]) -> None:
    """Do the same with all samples at once. A failure is raised when all are over: what is under way is paid for."""
    results = await asyncio.gather(*(step(sample) for sample in samples), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _alive(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.gate]


def _check_values(found: Found, sample: Sample, seen: set[tuple[Fraction, ...]]) -> None:
    """The gate `values`. What passes is remembered in `seen`."""
    if sample.gate:
        return
    for parameter in found.parameters:
        if reason := fits(parameter, sample.values[parameter.name]):
            sample.stop("values", f"{reason}: {parameter.name}")
            return
    key = tuple(sample.values[p.name] for p in found.parameters)
    if key in seen:
        sample.stop("values", "seen before")
    elif [n.value for n in find_numbers(with_values(found.question, found.parameters, sample.values))] != list(
        _expected(found, sample.values)
    ):
        sample.stop("values", "not to be read as they are written")
    seen.add(key)


def _expected(found: Found, values: Mapping[str, Fraction]) -> Iterator[Fraction]:
    """The numbers of the question, in order, with new values for the parameters and the old ones for the rest."""
    names = {p.number.start: p.name for p in found.parameters}
    for one in find_numbers(found.question):
        yield values[names[one.start]] if one.start in names else one.value


def _unfit(found: Found, answer: Fraction) -> str:
    """Why an answer is not of the known answer's kind; empty when it is."""
    if answer < 0 <= found.gold:
        return "a negative answer"
    if found.gold.denominator == 1 and answer.denominator != 1:
        return "not a whole number"
    known, places = decimal_places(found.gold), decimal_places(answer)
    if known is not None and (places is None or places > max(known, 2)):
        return "too many places"
    return ""


def _check_new(sample: Sample, seen: set[str]) -> None:
    key = question_key(sample.question)
    if key in seen:
        sample.stop("retelling", "no new question")
    seen.add(key)
