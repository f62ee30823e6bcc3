"""Long documents with an answer somewhere in them: facts in filler, strings to copy, parts on sentence borders.

A needle document is filler text with key-value facts at uniform depth, and questions about them at the end. Beside
them stand copy rows: a string without order or sense, and as the reply the same string from one of its parts on, over
and over, until the row is full. To look a name up takes two layers that work together, which form where nearly every
token depends on them; strings of one length, or with an order of their own, are learned by counting, and that finds no
facts.
Everything is decided by the seed and the number of the row. Lengths are those of the whole conversation, special tokens
included, in whatever `Size` counts: tokens of a tokenizer, or characters (`len`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.data.template import segments

Size = Callable[[str], int]
Form = Literal["sentences", "pairs"]
FORMS: dict[Form, tuple[str, str, str]] = {  # (fact, question, what a reply says before the value)
    "sentences": ("The code of {name} is {value}.", "What is the code of {name}?", ""),
    # The reply repeats the tokens of the fact, and nothing is between name and value: finding a fact is copying from
    # where its name stands.
    "pairs": (" {name}{value}.", "The {name}", " {name}"),
}
SHORTEST_COPY = 4  # parts
VALUE_SHARE = 0.4  # of what stands after a name
COPY_QUESTION = "Copy from {part}."
_SENTENCE = re.compile(r".+?(?:[.!?]['\")\]]*(?=\s|$)|\n\s*\n|$)\s*", re.DOTALL)
_SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
_SUBJECTS = ("the baker", "a sailor", "the old teacher", "my neighbor", "the child", "a farmer", "the king", "the dog")
_VERBS = ("carried", "found", "painted", "sold", "forgot", "mended", "watched", "hid")
_OBJECTS = (
    "a red lamp",
    "the boat",
    "some bread",
    "a long letter",
    "the gate",
    "two apples",
    "the clock",
    "a blue hat",
)
_PLACES = ("near the river", "in the garden", "on the hill", "at the market", "behind the church", "by the sea")


def sentences(text: str) -> list[str]:
    """The text cut after sentences and paragraphs; the parts, with the white space after them, make the text again."""
    return _SENTENCE.findall(text)


def generated_sentence(rng: random.Random) -> str:
    """A plain sentence, for filler where no text is given."""
    subject, verb, what, where = (rng.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES))
    return f"{subject[0].upper()}{subject[1:]} {verb} {what} {where}."


@functools.cache
def names(count: int) -> tuple[str, ...]:
    """Different invented names, always the same: 'Kelu', 'Ravo', ... Raises: ConfigError beyond 4,900."""
    every = ["".join(pair).capitalize() for pair in itertools.product(_SYLLABLES, repeat=2)]
    if not 1 <= count <= len(every):
        raise ConfigError(f"names: got {count}, expected 1 to {len(every):,}", hint="lower names")
    return tuple(random.Random(0).sample(every, count))


def conversation_size(messages: Sequence[Mapping[str, Any]], size: Size) -> int:
    """Length of a conversation in the chat format; the beginning and the end of each reply count 1."""
    return 1 + sum(1 if text is None else size(text) for text, _ in segments(messages))


@dataclass(frozen=True, kw_only=True)
class Needles:
    """How needle documents are made. A row of a given number is always the same."""

    size: Size = len
    """Length of a text."""
    form: Form = "sentences"
    """sentences: 'The code of Kelu is 471.'; pairs: 'Kelu471.', for models that are small and see little."""
    facts: int = 4
    """Facts in a document."""
    questions: int = 1
    """Questions of a training row, each about any of its facts; test rows have one."""
    names: int = 100
    """Names that facts are about."""
    digits: int = 5
    """Digits of a fact's value."""
    copy_share: float = 0.4
    """Share of the training rows in which a string is to be copied."""
    copy_words: int = 20
    """Most names and values in such a string."""
    filler: Sequence[str] = field(default=(), repr=False)
    """Sentences to fill documents with, in their order from a random one on; empty: generated ones."""
    seed: int = 0
    """Another seed gives other rows."""

    def __post_init__(self) -> None:
        if self.questions < 1 or not 1 <= self.facts <= min(self.names, 10**self.digits):
            raise ConfigError(
                f"questions, facts, names, digits: got {self.questions}, {self.facts}, {self.names}, {self.digits}, "
                "expected a question or more, and a name and a value for each fact",
                hint="plant fewer facts, or allow more names or digits",
            )
        if self.digits < 1 or self.copy_words < 1 or not 0 <= self.copy_share <= 1:
            raise ConfigError("digits and copy_words must be at least 1, copy_share 0 to 1", hint="change them")

    def training_row(self, number: int, length: int) -> dict[str, Any]:
        """A row of kind `messages` of at most `length`: facts that are asked for, or a string to copy."""
        rng = random.Random(derive_seed(self.seed, "needle row", number, length))
        if rng.random() < self.copy_share:
            return {"messages": self._copy(rng, length)}
        facts = self._facts(rng)
        asked = rng.choices(facts, k=self.questions)  # with repetition: without, the last one follows from the others
        turns = [self._turn(*fact) for fact in asked]
        planted = [(rng.random(), self._fact(*fact)) for fact in facts]
        return {"messages": self._conversation(rng, length, planted, turns)}

    def test_row(self, number: int, length: int, depth: float) -> dict[str, Any]:
        """A row of kind `answer`: a document, up to `length` with its reply, and the fact at `depth` (0 to 1).

        Metadata: length, depth, facts, and `lead`, what a reply says before the value.
        """
        rng = random.Random(derive_seed(self.seed, "needle test", number, length, f"{depth:g}"))
        facts = self._facts(rng)
        depths = [depth, *(rng.random() for _ in facts[1:])]
        planted = [(where, self._fact(*fact)) for where, fact in zip(depths, facts, strict=True)]
        name, value = facts[0]
        messages = self._conversation(rng, length, planted, [self._turn(name, value)])
        lead = FORMS[self.form][2].format(name=name)
        metadata = {"length": length, "depth": depth, "facts": self.facts, "lead": lead}
        row = {"id": f"{length}-{depth:g}-{number}", "prompt": messages[0]["content"], "answer": value}
        return {**row, "kind": "exact", "metadata": metadata}

    def _copy(self, rng: random.Random, length: int) -> list[dict[str, str]]:
        """A string, and a reply that goes on from one of its parts for as long as there is room."""
        parts = self._nonsense(rng, rng.randint(min(SHORTEST_COPY, self.copy_words), self.copy_words))
        start, reply = rng.randrange(len(parts)), list[str]()
        asked = f"{''.join(parts)}\n{COPY_QUESTION.format(part=parts[start].strip())}"

        def messages() -> list[dict[str, str]]:
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": "".join(reply)}]

        room = length - conversation_size(messages(), self.size)
        sizes = {part: max(1, self.size(part)) for part in parts}
        for part in itertools.islice(itertools.cycle(parts), start, None):
            room -= sizes[part]
            if room < 0:
                break
            reply.append(part)
        while reply and conversation_size(messages(), self.size) > length:
            reply.pop()  # parts may be longer together than they are alone
        if not reply:
            raise ConfigError(
                f"length: got {length}, but a string to copy alone needs as much",
                hint="make rows longer, or copy_words fewer",
            )
        return messages()

    def _nonsense(self, rng: random.Random, count: int) -> list[str]:
        """Names and values at random, each of which may come again; no value stands after another, or begins."""
        parts = list[str]()
        for _ in range(count):
            if parts and parts[-1][0] == " " and rng.random() < VALUE_SHARE:
                parts.append(self._value(rng.randrange(10**self.digits)))
            else:
                parts.append(f" {rng.choice(names(self.names))}")
        return parts

    def _value(self, number: int) -> str:
        return str(number).zfill(self.digits)

    def _facts(self, rng: random.Random) -> list[tuple[str, str]]:
        values = [self._value(number) for number in rng.sample(range(10**self.digits), self.facts)]
        return list(zip(rng.sample(names(self.names), self.facts), values, strict=True))

    def _fact(self, name: str, value: str) -> str:
        return FORMS[self.form][0].format(name=name, value=value)

    def _turn(self, name: str, value: str) -> tuple[str, str]:
        _, question, lead = FORMS[self.form]
        return question.format(name=name), lead.format(name=name) + value

    def _conversation(
        self, rng: random.Random, length: int, planted: Sequence[tuple[float, str]], turns: Sequence[tuple[str, str]]
    ) -> list[dict[str, str]]:
        """The turns, the first of them after a document with the texts of `planted` at their depths."""

        def filled(filler: Sequence[str]) -> list[dict[str, str]]:
            (question, answer), *others = turns
            document = _join(filler, planted)
            pairs = [(f"{document}\n{question}", answer), *others]
            return [
                {"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair, strict=True)
            ]

        room = length - conversation_size(filled([]), self.size)
        if room < 0:
            raise ConfigError(
                f"length: got {length}, but the facts and questions alone need {length - room}",
                hint="make rows longer, or use fewer facts and questions, or form pairs",
            )
        filler = self._filler(rng, room)
        while conversation_size(messages := filled(filler), self.size) > length:
            filler.pop()  # parts may be longer together than they are alone
        return messages

    def _filler(self, rng: random.Random, room: int) -> list[str]:
        """Sentences that fill the room, each preceded by a space in the document; the last is cut after a word."""
        chosen = list[str]()
        start = rng.randrange(len(self.filler)) if self.filler else 0
        while room > 0:
            place = (start + len(chosen)) % max(len(self.filler), 1)
            sentence = self.filler[place].strip() if self.filler else generated_sentence(rng)
            size = max(1, self.size(f" {sentence}"))
            if size > room:
                sentence = self._beginning(sentence, room)
            if sentence:
                chosen.append(sentence)
            room -= size
        return chosen

    def _beginning(self, sentence: str, room: int) -> str:
        """The first words of a sentence that fit into the room."""
        words = sentence.split(" ")
        fitting = bisect.bisect_right(range(1, len(words)), room, key=lambda n: self.size(f" {' '.join(words[:n])}"))
        return " ".join(words[:fitting])


def _join(filler: Sequence[str], planted: Iterable[tuple[float, str]]) -> str:
    """Sentences with texts among them: depth 0 is before the first sentence, 1 after the last."""
    places: dict[int, list[str]] = {}
    for depth, text in planted:
        places.setdefault(round(depth * len(filler)), []).append(text)
    pieces = [[*places.get(place, ()), *filler[place : place + 1]] for place in range(len(filler) + 1)]
    first, *others = itertools.chain.from_iterable(pieces)
    joined = "".join(part if part[0].isspace() else f" {part}" for part in others)
    return (first.removeprefix("\n") + joined).rstrip()


def cut(document: str, length: int, size: Size) -> str:
    """The first whole sentences of a document that are at most `length` together; all of it when it is shorter."""
    kept, used = list[str](), 0
    for sentence in sentences(document):
        used += size(sentence)
        if used > length:
            break
        kept.append(sentence)
    return "".join(kept)


def random_part(document: str, shortest: int, longest: int, size: Size, rng: random.Random) -> str | None:
    """A contiguous part on sentence borders, `shortest` to `longest` long, anywhere; None if there is none."""
    parts = sentences(document)
    ends = list(itertools.accumulate(map(size, parts), initial=0))
    wanted = rng.randint(shortest, longest)
    starts = [start for start in range(len(parts)) if ends[-1] - ends[start] >= shortest]
    rng.shuffle(starts)
    for start in starts:
        fitting = [end for end in range(start + 1, len(parts) + 1) if shortest <= ends[end] - ends[start] <= longest]
        if fitting:
            end = min(fitting, key=lambda end: abs(ends[end] - ends[start] - wanted))
            return "".join(parts[start:end]).strip()
    return None
