"""A solver whose habits are known exactly: it reads our prompts and replies in prose, right or wrong at given rates.

It exists to check that the methods do what they say, against closed forms (`chance_of_chain`, `plurality`). What it
yields is no evidence about language models.

Problems are chains: v0 = k0; v_t = (a_t * v_{t-1} + b_t) mod p. A stated value differs from what follows from the
value stated before it by the step's *deviation*, 0 for a right step. p is large, so two wrong chains hardly ever meet.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.core.errors import ConfigError, EndpointError
from luthier.core.seeds import derive_seed
from luthier.llm.types import Completion, Message, Request, Score, Usage
from luthier.reason.prompts import FULL
from luthier.tasks.answers import extract_answer

MODULUS = 1_000_003
_OPERATION = re.compile(r"v(\d+) = \((\d+) \* v\d+ \+ (\d+)\) mod \d+")
_LINE = re.compile(r"^v(\d+) = (\d+)\b", re.MULTILINE)
_VALUE_OF = re.compile(r"What is v(\d+)\?")


@dataclass(frozen=True, kw_only=True)
class Habits:
    """Rates (0 to 1) at which the simulated solver errs."""

    error: float = 0.1
    """e: a step goes wrong, in a solution and in a re-answer alike, independently each time."""
    variants: int = 8
    """W: equally likely wrong results of a step."""
    trap: float = 0.0
    """h: share of steps with a mistake that comes back."""
    trap_strength: float = 0.0
    """s: how often a trap is stepped into."""
    judge_finds: float = 0.5
    """Share of wrong solutions that the judge of whole solutions flags (its true positive rate)."""
    judge_imagines: float = 0.1
    """Share of right solutions that it flags (its false positive rate)."""
    downstream: Literal["patch", "regenerate"] = "patch"
    """After a mended step: keep the logic of the later steps, or draw them anew."""
    obeys: float = 1.0
    """Share of hints that are taken over."""
    garbled: float = 0.0
    """Share of replies without a readable answer."""
    blind: bool = False
    """Re-answers are drawn at random: verification then carries no information."""


@dataclass(frozen=True)
class Chain:
    """A problem: the first value, then (a, b) of each step. Values are numbers mod `MODULUS`."""

    first: int
    steps: tuple[tuple[int, int], ...]

    @classmethod
    def draw(cls, length: int, seed: int) -> Chain:
        """A random chain of `length` steps."""
        rng = random.Random(derive_seed(seed, "chain", length))
        pairs = tuple((rng.randrange(2, MODULUS), rng.randrange(MODULUS)) for _ in range(length))
        return cls(rng.randrange(MODULUS), pairs)

    @classmethod
    def read(cls, text: str) -> Chain:
        """The first chain that a text states."""
        found = re.search(r"v0 = (\d+)", text)
        steps = {int(index): (int(a), int(b)) for index, a, b in _OPERATION.findall(text)}
        if found is None or not steps:
            raise ConfigError("the simulated solver found no chain in what it was asked", hint="ask it about a Chain")
        return cls(int(found[1]), tuple(steps[index] for index in sorted(steps)))

    @property
    def question(self) -> str:
        """As it is asked."""
        lines = [f"v0 = {self.first}."]
        lines += [f"v{t} = ({a} * v{t - 1} + {b}) mod {MODULUS}." for t, (a, b) in enumerate(self.steps, 1)]
        return "\n".join([*lines, f"What is v{len(self.steps)}?"])

    @property
    def answer(self) -> str:
        """The right final value."""
        return str(self.follow([0] * len(self.steps))[-1])

    def apply(self, index: int, before: int) -> int:
        """What follows at step `index` (from 1) from the value before it."""
        a, b = self.steps[index - 1]
        return (a * before + b) % MODULUS

    def follow(self, deviations: Sequence[int]) -> list[int]:
        """The values that deviations lead to."""
        values = [self.first]
        for index, deviation in enumerate(deviations, 1):
            values.append((self.apply(index, values[-1]) + deviation) % MODULUS)
        return values[1:]

    def deviations(self, values: Sequence[int]) -> list[int]:
        """By how much each value differs from what follows from the one before it."""
        before = [self.first, *values]
        return [(value - self.apply(i, before[i - 1])) % MODULUS for i, value in enumerate(values, 1)]


class SimulatedSolver:
    """A backend that answers our full prompts about chains. Replies depend on the request, its seed and its index."""

    def __init__(self, habits: Habits, *, seed: int = 0, model: str = "simulated") -> None:
        self.habits = habits
        self.model = model
        self.usage = Usage()
        self._seed = seed

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples. Tokens are counted as words."""
        prompt = sum(len(message["content"].split()) for message in request.messages)
        completions = []
        for index in range(request.first_sample, request.first_sample + request.n):
            first = index == request.first_sample
            text = _cut(self.reply(request.messages, request.seed, index), request.stop)
            used = Usage(prompt_tokens=prompt * first, completion_tokens=len(text.split()), calls=int(first))
            self.usage += used
            completions.append(Completion(text=text, finish_reason="stop", index=index, usage=used))
        return completions

    async def score(self, prompt: str, completion: str) -> Score:
        """Not simulated."""
        raise EndpointError("the simulated solver gives no probabilities", hint="use another backend")

    async def aclose(self) -> None:
        """Nothing to release."""

    def reply(self, messages: Sequence[Message], seed: int | None, index: int) -> str:
        """One reply to a conversation that our prompts made."""
        said = json.dumps([dict(message) for message in messages])
        digest = hashlib.sha256(f"{self._seed}|{seed}|{index}|{said}".encode()).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        if rng.random() < self.habits.garbled:
            return "I am not sure about this one."
        return _Reply(self.habits, rng, messages).text()


class _Reply:
    def __init__(self, habits: Habits, rng: random.Random, messages: Sequence[Message]) -> None:
        self.habits, self.rng, self.messages = habits, rng, messages
        self.asked = messages[-1]["content"]

    def text(self) -> str:
        if self.messages[-1]["role"] == "assistant":
            return self.go_on()
        for prompt, write in _KINDS.items():
            if _mark(prompt) in self.asked:
                return write(self)
        raise ConfigError("the simulated solver does not know this prompt", hint="use the full prompts")

    def solve(self) -> str:
        chain = Chain.read(self.asked)
        return _solution(chain, chain.follow(self.draw(chain, 1)))

    def go_on(self) -> str:
        """The rest of a solution that was begun, line by line."""
        chain = Chain.read(self.messages[-2]["content"])
        deviations = chain.deviations([value for _, value in _values(self.asked)])
        following = chain.follow([*deviations, *self.draw(chain, len(deviations) + 1)])
        return "\n".join(_solution(chain, following).split("\n")[len(deviations) :])

    def draw(self, chain: Chain, first: int) -> list[int]:
        """Deviations of the steps from `first` on."""
        return [self.deviation(chain, index) for index in range(first, len(chain.steps) + 1)]

    def deviation(self, chain: Chain, index: int) -> int:
        habits, rng = self.habits, self.rng
        if habits.trap:
            trap = random.Random(derive_seed(chain.first, "trap", index, str(chain.steps[index - 1])))
            if trap.random() < habits.trap:
                fixed = trap.randrange(1, habits.variants + 1)
                if rng.random() < habits.trap_strength:
                    return fixed
        return rng.randrange(1, habits.variants + 1) if rng.random() < habits.error else 0

    def decompose(self) -> str:
        solution = _between(self.asked, "solution")
        steps = [{"question": f"What is v{t}?", "answer": str(value)} for t, value in _values(solution)]
        return json.dumps({"steps": steps})

    def step(self) -> str:
        chain = Chain.read(self.asked)
        index = int(_VALUE_OF.findall(_between(self.asked, "question"))[-1])
        if self.habits.blind:
            return f"It is <answer>{self.rng.randrange(MODULUS)}</answer>"
        stated = dict(re.findall(r"What is v(\d+)\?\n   -> (\d+)", self.asked))
        before = int(stated[str(index - 1)]) if index > 1 else chain.first
        value = (chain.apply(index, before) + self.deviation(chain, index)) % MODULUS
        return f"v{index} = {value}, so <answer>{value}</answer>"

    def match(self) -> str:
        expression = _between(self.asked, "expression")
        references = re.findall(r"^[A-Z]\. (.*)$", _between(self.asked, "references"), re.MULTILINE)
        share = sum(reference == expression for reference in references) / len(references)
        return f"<answer>{round(5 * share)}</answer>"

    def judge(self) -> str:
        chain = Chain.read(self.asked)
        right = extract_answer(_between(self.asked, "solution")) == chain.answer
        flagged = self.rng.random() < (self.habits.judge_imagines if right else self.habits.judge_finds)
        return f"I went through it. <answer>{2 if flagged else 5}</answer>"

    def rewrite(self) -> str:
        """From the first wrong step half of the time, else from any step, everything is drawn anew."""
        chain = Chain.read(self.asked)
        deviations = chain.deviations([value for _, value in _values(_between(self.asked, "solution"))])
        wrong = next((index for index, deviation in enumerate(deviations) if deviation), None)
        start = wrong if wrong is not None and self.rng.random() < 0.5 else self.rng.randrange(len(deviations))
        return _solution(chain, chain.follow([*deviations[:start], *self.draw(chain, start + 1)]))

    def refine(self) -> str:
        chain = Chain.read(self.messages[-3]["content"])
        doubted = self.messages[-2]["content"]
        deviations = chain.deviations([value for _, value in _values(doubted)])
        stated = chain.follow(deviations)
        asserted, later = _findings(doubted)
        for index, hint in (asserted | later).items():
            if self.rng.random() < self.habits.obeys:
                before = stated[index - 2] if index > 1 else chain.first
                deviations[index - 1] = (hint - chain.apply(index, before)) % MODULUS
        if self.habits.downstream == "regenerate":
            last = max(asserted | later)
            deviations[last:] = self.draw(chain, last + 1)
        return "<evaluation>It is as I feared.</evaluation>\n" + _solution(chain, chain.follow(deviations))


_KINDS = {
    "refine": _Reply.refine,
    "patch": _Reply.refine,
    "decompose": _Reply.decompose,
    "step": _Reply.step,
    "confidence": _Reply.match,
    "judge": _Reply.judge,
    "rewrite": _Reply.rewrite,
    "solve": _Reply.solve,
}


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _mark(prompt: str) -> str:
    """The longest stretch of a template without a value: it tells which prompt was used."""
    stretches = re.split(r"\{\w+\}", FULL.texts[prompt])
    return max(stretches, key=len).replace("{{", "{").replace("}}", "}")


def _between(text: str, tag: str) -> str:
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def _values(solution: str) -> list[tuple[int, int]]:
    return [(int(index), int(value)) for index, value in _LINE.findall(solution) if index != "0"]


def _solution(chain: Chain, values: Sequence[int]) -> str:
    lines = [f"v{index} = {value} follows." for index, value in enumerate(values, 1)]
    return "\n".join([*lines, f"<answer>{values[-1]}</answer>"])


def _findings(doubted: str) -> tuple[dict[int, int], dict[int, int]]:
    """Hints by step: those that are asserted, and those that are to be done again."""

    def read(template: str) -> dict[int, int]:
        escaped = re.escape(FULL.texts[template])
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", escaped)
        found: dict[int, int] = {}
        for match in re.finditer(pattern, doubted):
            if (step := _VALUE_OF.search(match["question"])) and match["hint"].isdigit():
                found[int(step[1])] = int(match["hint"])
        return found

    return read("finding"), read("finding_later")


def chance_of_chain(length: int, habits: Habits) -> float:
    """Probability that a chain of thought is right."""
    trapped = (1 - habits.trap_strength) * (1 - habits.error)
    return float(((1 - habits.trap) * (1 - habits.error) + habits.trap * trapped) ** length)


def plurality(samples: int, error: float, variants: int) -> float:
    """Probability that the most common of `samples` re-answers is right, the first seen winning ties. Exact."""

    def ways(right: int, cap: int, tied: bool) -> Mapping[int, float]:
        """Weight of wrong answers spread over the variants with counts up to cap, by how many have that count."""
        spread: dict[tuple[int, int], float] = {(0, 0): 1.0}
        for _ in range(variants):
            following: dict[tuple[int, int], float] = {}
            for (used, top), weight in spread.items():
                for count in range(min(cap, samples - right - used) + 1):
                    key = (used + count, top + (tied and count == cap))
                    following[key] = following.get(key, 0.0) + weight / math.factorial(count)
            spread = following
        return {top: weight for (used, top), weight in spread.items() if used == samples - right}

    total = 0.0
    for right in range(1, samples + 1):
        scale = math.factorial(samples) / math.factorial(right)
        scale *= (1 - error) ** right * (error / variants) ** (samples - right)
        # All with the leading count are equally likely to have been seen first.
        total += scale * sum(weight / (1 + top) for top, weight in ways(right, right, True).items())
    return total


def guarded_patch(length: int, rounds: int, error: float, mended: float) -> float:
    """Probability that SSR mends all of at most `rounds` wrong steps, each with probability `mended`."""
    return sum(
        math.comb(length, wrong) * error**wrong * (1 - error) ** (length - wrong) * mended**wrong
        for wrong in range(rounds + 1)
    )
