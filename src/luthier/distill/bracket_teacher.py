"""A teacher that is known exactly: it writes brackets, and its every probability can be computed. Loads no torch.

A prompt of a few symbols sets how readily brackets are opened and which types of them are likely; the reply is a
balanced string such as ([]{}). The machine has a stack: at each place it opens a bracket, or closes the last open one,
or ends where none is open. Replies have one pair at least, and as many tokens as `max_tokens` at most: near that the
machine only opens what it can still close.

So a student has two things to learn: the long-range rule (what closes is what was opened last) decides whether a string
is valid, the rates that the prompt sets decide how likely it is. A token is a character; the end is a token too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from luthier.core.errors import ConfigError, DataError, EndpointError
from luthier.core.seeds import derive_seed
from luthier.llm.types import Completion, Request, Score, TokenLogprob, Usage

Floats = npt.NDArray[np.float64]
PAIRS = ("()", "[]", "{}", "<>", "«»", "⟨⟩", "⌈⌉", "⌊⌋")
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class BracketTeacher:
    """The machine's settings: how hard it is to imitate. What a prompt means follows from `table_seed`."""

    types: int = 3
    """Types of brackets, 1 to 8."""
    symbols: int = 8
    """Different symbols in prompts, 1 to 26."""
    prompt_length: int = 3
    """Symbols of a prompt."""
    max_tokens: int = 30
    """Longest reply, the end not counted; even."""
    opening: float = 0.43
    """Probability to open rather than close or end, for a prompt in the middle: it sets the length."""
    opening_spread: float = 0.35
    """Standard deviation over prompts of the logit of `opening`: how much a prompt says about the length."""
    type_spread: float = 1.0
    """The same of the logits of the types: how much it says about which brackets come."""
    table_seed: int = 0
    """Which meaning the symbols have."""

    def __post_init__(self) -> None:
        limits = (
            ("types", 1 <= self.types <= len(PAIRS), f"1 to {len(PAIRS)}"),
            ("symbols", 1 <= self.symbols <= len(SYMBOLS), f"1 to {len(SYMBOLS)}"),
            ("prompt_length", self.prompt_length >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 2 and self.max_tokens % 2 == 0, "an even number, at least 2"),
            ("opening", 0 < self.opening < 1, "between 0 and 1"),
            ("opening_spread", self.opening_spread >= 0, "at least 0"),
            ("type_spread", self.type_spread >= 0, "at least 0"),
        )
        for name, valid, expected in limits:
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {expected}", hint=f"change {name}")

    @property
    def model(self) -> str:
        """A name that holds every setting."""
        settings = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "brackets:" + ",".join(f"{name}={value}" for name, value in settings)

    @cached_property
    def tokens(self) -> str:
        """The characters of replies: all that open, then in the same order all that close."""
        return "".join(pair[0] for pair in PAIRS[: self.types]) + "".join(pair[1] for pair in PAIRS[: self.types])

    @property
    def end(self) -> int:
        """Index of the end in the rows of `conditionals`, after all characters."""
        return 2 * self.types

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """Different prompts in random order. Raises: ConfigError when there are not so many."""
        total = self.symbols**self.prompt_length
        if not 0 < count <= total:
            raise ConfigError(
                f"prompts: got {count}, expected 1 to {total}: there are no more of {self.prompt_length} symbols",
                hint="take longer prompts (prompt_length) or more symbols",
            )
        draw = random.Random(derive_seed(seed, "bracket prompts"))
        return [self._prompt(number) for number in draw.sample(range(total), count)]

    def _prompt(self, number: int) -> str:
        places = (number // self.symbols**place % self.symbols for place in range(self.prompt_length))
        return "".join(SYMBOLS[place] for place in places)

    @cached_property
    def _meaning(self) -> Floats:
        """(symbols, 1 + types) normal deviates: what a symbol adds to the logits of opening and of the types."""
        rng = np.random.Generator(np.random.PCG64(derive_seed(self.table_seed, "brackets")))
        return rng.standard_normal((self.symbols, 1 + self.types))

    def rates(self, prompt: str) -> tuple[float, Floats]:
        """Probability of opening, and of each type (types,), after `prompt`. Raises: DataError for another's prompt."""
        places = [SYMBOLS.find(symbol) for symbol in prompt]
        if len(places) != self.prompt_length or not all(0 <= place < self.symbols for place in places):
            known = SYMBOLS[: self.symbols]
            raise DataError(
                f"{prompt!r} is no prompt of this teacher: expected {self.prompt_length} letters out of {known}",
                hint="BracketTeacher.prompts makes them",
            )
        added = self._meaning[places].sum(0) / math.sqrt(self.prompt_length)
        logit = math.log(self.opening / (1 - self.opening)) + self.opening_spread * added[0]
        odds = np.exp(self.type_spread * added[1:])
        return 1 / (1 + math.exp(-logit)), odds / odds.sum()

    def conditionals(self, prompt: str, reply: str) -> Floats:
        """(len(reply) + 1, 2 types + 1) probabilities of each next token after each prefix of `reply`.

        After a prefix that this teacher cannot write, and for characters that it does not know, rows are NaN.
        """
        rates = self.rates(prompt)
        rows = np.full((len(reply) + 1, self.end + 1), np.nan)
        stack: list[int] = []
        for place in range(len(reply) + 1):
            rows[place] = self._next(rates, stack, place)
            if place == len(reply):
                break
            token = self.tokens.find(reply[place])
            if token < 0 or rows[place, token] == 0:
                break
            if token < self.types:
                stack.append(token)
            else:
                stack.pop()
        return rows

    def _next(self, rates: tuple[float, Floats], stack: Sequence[int], written: int) -> Floats:
        """(2 types + 1,) probabilities of the next token."""
        opening, types = rates
        row = np.zeros(self.end + 1)
        opening = self._opening(opening, len(stack), written)
        row[: self.types] = opening * types
        row[self.types + stack[-1] if stack else self.end] = 1 - opening
        return row

    def _opening(self, rate: float, depth: int, written: int) -> float:
        """Probability to open: 1 at the start, 0 where too little room is left to close again."""
        if written == 0:
            return 1.0
        return rate if written + depth + 2 <= self.max_tokens else 0.0

    def log_probability(self, prompt: str, reply: str) -> float:
        """ln p(reply, end | prompt) in nats; -inf for what this teacher never writes."""
        rows = self.conditionals(prompt, reply)
        chosen = [*map(self.tokens.find, reply), self.end]
        total = 0.0
        for row, token in zip(rows, chosen, strict=True):
            if token < 0 or not row[token] > 0:  # NaN follows an impossible token
                return -math.inf
            total += math.log(row[token])
        return total

    def is_valid(self, prompt: str, reply: str) -> bool:
        """Whether this teacher can write the whole reply."""
        return self.log_probability(prompt, reply) > -math.inf

    def draw(self, prompt: str, rng: random.Random, temperature: float = 1.0) -> str:
        """One reply. `temperature` rescales each next token's probabilities; at 0 the most likely one is taken."""
        rates, stack, reply = self.rates(prompt), list[int](), ""
        while True:
            row = _tempered(self._next(rates, stack, len(reply)), temperature)
            (token,) = rng.choices(range(self.end + 1), row.tolist())
            if token == self.end:
                return reply
            if token < self.types:
                stack.append(token)
            else:
                stack.pop()
            reply += self.tokens[token]

    def state_probabilities(self, prompt: str) -> Floats:
        """(max_tokens + 1, max_tokens + 1) probability that a reply of so many tokens so far has so many open brackets.

        Row n sums to the probability that a reply is not over before n tokens. By dynamic programming: types do not
        matter for how the stack grows and shrinks.
        """
        rate, _ = self.rates(prompt)
        reach = np.zeros((self.max_tokens + 1, self.max_tokens + 2))
        reach[0, 0] = 1.0
        for written in range(self.max_tokens):
            for depth in range(min(written, self.max_tokens - written) + 1):
                opening = self._opening(rate, depth, written)
                reach[written + 1, depth + 1] += reach[written, depth] * opening
                if depth:
                    reach[written + 1, depth - 1] += reach[written, depth] * (1 - opening)
        return reach[:, : self.max_tokens + 1]

    def entropy(self, prompt: str) -> float:
        """H(reply | prompt) in nats: the sum over states of their probability times the entropy of the next token."""
        rate, types = self.rates(prompt)
        of_types = -float(types @ np.log(types))
        total = 0.0
        for (written, depth), mass in np.ndenumerate(self.state_probabilities(prompt)):
            if mass > 0:
                opening = self._opening(rate, depth, written)
                total += mass * (_binary_entropy(opening) + opening * of_types)
        return total

    def length_distribution(self, prompt: str) -> Floats:
        """(max_tokens + 1,) probability of each length of a reply, in tokens without the end."""
        rate, _ = self.rates(prompt)
        reach = self.state_probabilities(prompt)[:, 0]
        ends = [1 - self._opening(rate, 0, written) for written in range(self.max_tokens + 1)]
        return reach * np.array(ends)

    def support(self, prompt: str) -> Iterator[str]:
        """Every reply that has a probability, by enumeration: for tests, and for short `max_tokens` only."""
        for length in range(2, self.max_tokens + 1, 2):
            for characters in product(self.tokens, repeat=length):
                reply = "".join(characters)
                if self.is_valid(prompt, reply):
                    yield reply


def _tempered(row: Floats, temperature: float) -> Floats:
    if temperature == 1:
        return row
    if temperature == 0:
        return (np.arange(len(row)) == row.argmax()).astype(float)
    with np.errstate(divide="ignore"):
        logits = np.log(row) / temperature
    return np.exp(logits - logits.max())


def _binary_entropy(p: float) -> float:
    return 0.0 if p in (0.0, 1.0) else -p * math.log(p) - (1 - p) * math.log1p(-p)


class BracketBackend:
    """The teacher as a `Backend`: a raw prompt, or the last message, is its prompt. Sample k has a seed of its own."""

    def __init__(self, teacher: BracketTeacher) -> None:
        self.teacher, self.model, self.usage = teacher, teacher.model, Usage()

    async def complete(self, request: Request) -> list[Completion]:
        """The request's samples; EndpointError for what is no prompt of the teacher."""
        if request.top_p < 1 or request.top_k or request.stop or request.logprobs or request.response_format:
            raise EndpointError(
                "the bracket teacher knows temperature, max_tokens and seed only", hint="leave the other settings out"
            )
        asked = request.prompt if request.prompt is not None else request.messages[-1]["content"]
        seed = random.SystemRandom().getrandbits(63) if request.seed is None else request.seed
        completions = []
        for index in range(request.first_sample, request.first_sample + request.n):
            rng = random.Random(derive_seed(seed, "brackets", asked, index))
            reply = self._draw(asked, rng, request.temperature)
            completions.append(self._completion(reply, request, index))
        self.usage += sum((completion.usage for completion in completions), Usage())
        return completions

    def _draw(self, asked: str, rng: random.Random, temperature: float) -> str:
        try:
            return self.teacher.draw(asked, rng, temperature)
        except DataError as error:
            raise EndpointError(str(error), hint=error.hint) from error

    def _completion(self, reply: str, request: Request, index: int) -> Completion:
        room = request.max_tokens or len(reply)
        first = index == request.first_sample
        usage = Usage(
            prompt_tokens=self.teacher.prompt_length * first,
            completion_tokens=min(room, len(reply)),
            calls=int(first),
        )
        finish = "stop" if len(reply) <= room else "length"
        return Completion(text=reply[:room], finish_reason=finish, index=index, usage=usage)  # type: ignore[arg-type]

    async def score(self, prompt: str, completion: str) -> Score:
        """The log-probability of each character, the end not counted; EndpointError for what cannot be written."""
        rows = self.teacher.conditionals(prompt, completion)
        chosen = [self.teacher.tokens.find(character) for character in completion]
        if not all(token >= 0 and row[token] > 0 for row, token in zip(rows, chosen, strict=False)):
            raise EndpointError(f"the bracket teacher never writes {completion!r}", hint="score what it can write")
        logprobs = [math.log(row[token]) for row, token in zip(rows, chosen, strict=False)]
        tokens = tuple(
            TokenLogprob(token=text, logprob=value) for text, value in zip(completion, logprobs, strict=True)
        )
        usage = Usage(prompt_tokens=len(prompt) + len(completion), calls=1)
        self.usage += usage
        return Score(tokens=tokens, usage=usage)

    async def aclose(self) -> None:
        """Nothing is held."""
