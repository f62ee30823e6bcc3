"""Likelihood tasks made from any text: nothing to download, nothing to label, and always the same items.

* cloze: how a sentence goes on, among three endings of like length from other documents;
* word-order: the sentence, or the same with two of its words swapped;
* last-word: the last word of a sentence, after what comes before it.

A sentence begins with a capital, ends with . ! or ?, has 8 to 24 words, and most of what stands between its spaces is
words: code, tables and lists are left out. Line breaks inside a paragraph become spaces.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.core.errors import DataError
from luthier.core.seeds import derive_seed
from luthier.data.sources import TextSource, open_source, split
from luthier.tasks.likelihood import Item, LikelihoodTask, joined

SIZE = 400  # items at most: 95 % intervals of 5 points
FEWEST = 8  # sentences that a text must have
HELD_OUT, SPLIT_SEED = 0.1, 6198  # what `luthier pretrain` holds out of a corpus unless it is told otherwise
WORDS = range(8, 25)
BEFORE = 24  # words of earlier sentences, at most
WRONG_ENDINGS = 3
WINDOW = 24  # endings of like length, on either side, among which the wrong ones are drawn
PROSE = 0.8  # least share of words
_END = re.compile(r"(?<=[.!?])\s+(?=[\"'“(]?[^\W\d_])")
_WORD = re.compile(r"[\"'“‘(]?[^\W\d_]+(?:['’-][^\W\d_]+)*[\"'”’)]?[,.;:!?]?[\"'”’)]?")


@dataclass(frozen=True)
class Sentence:
    """A sentence, the place of its document, and what stands before it in its paragraph."""

    document: int
    before: str
    words: tuple[str, ...]


def open_text_task(name: str, spec: str = "") -> LikelihoodTask:
    """The task `name` from a corpus as `open_source` takes it, all of it.

    Without `spec` from what pretraining holds out of python-prose by default. Raises: DataError.
    """
    if spec:
        source = open_source(spec)
    else:
        source = split(open_source("python-prose"), HELD_OUT, SPLIT_SEED)[1]
    return TEXT_TASKS[name](source)


def cloze(source: TextSource, size: int = SIZE) -> LikelihoodTask:
    """Sentences without their second halves; the other endings are those of other documents, or other sentences if
    there is one document."""
    found = sentences(source)
    endings = sorted({(len(ending), ending, one.document) for one in found for ending in [_halves(one)[1]]})
    different = len({one.document for one in found}) > 1
    items = []
    for number, one in enumerate(_draw(found, "cloze", size)):
        beginning, ending = _halves(one)
        place = bisect_left(endings, (len(ending), ending, one.document))
        near = endings[max(0, place - WINDOW) : place + WINDOW]
        others = sorted({text for _, text, home in near if text != ending and (home != one.document or not different)})
        rng = random.Random(derive_seed(0, "cloze", number))
        if len(others) < WRONG_ENDINGS:
            raise DataError(f"{source.name}: too few different sentences for a cloze", hint="give more prose")
        texts = rng.sample(others, WRONG_ENDINGS)
        label = rng.randrange(WRONG_ENDINGS + 1)
        texts.insert(label, ending)
        options = tuple(joined(joined(one.before, beginning).whole, text) for text in texts)
        items.append(Item(id=str(number), options=options, label=label))
    return LikelihoodTask(_name("cloze", source), "choice", items)


def word_order(source: TextSource, size: int = SIZE) -> LikelihoodTask:
    """Sentences, and the same with two different words swapped; the first and the last stay."""
    items = []
    for number, one in enumerate(_draw(sentences(source), "word-order", size)):
        rng = random.Random(derive_seed(0, "word-order", number))
        inner = [place for place in range(1, len(one.words) - 1) if one.words[place].isalpha()]
        pairs = [(a, b) for a in inner for b in inner if a < b and one.words[a].lower() != one.words[b].lower()]
        if not pairs:
            continue
        a, b = rng.choice(pairs)
        swapped = list(one.words)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        options = tuple(joined("", " ".join(words)) for words in (one.words, swapped))
        items.append(Item(id=str(number), options=options))
    return LikelihoodTask(_name("word-order", source), "pair", items)


def last_word(source: TextSource, size: int = SIZE) -> LikelihoodTask:
    """Sentences without their last word, which has three letters or more; the full stop is no part of it."""
    ending_in_word = [one for one in sentences(source) if len(w := one.words[-1][:-1]) > 2 and w.isalpha()]
    items = []
    for number, one in enumerate(_draw(ending_in_word, "last-word", size)):
        context = joined(one.before, " ".join(one.words[:-1])).whole
        items.append(Item(id=str(number), options=(joined(context, one.words[-1][:-1]),)))
    return LikelihoodTask(_name("last-word", source), "target", items)


def sentences(source: TextSource) -> list[Sentence]:
    """All sentences of a corpus that can be used, none twice. Raises: DataError for conversations, or too few."""
    if source.conversations:
        raise DataError(f"{source.name}: conversations, expected text", hint="give a file or folder of prose")
    seen, found = set[tuple[str, ...]](), list[Sentence]()
    for place, document in enumerate(source.documents):
        for paragraph in re.split(r"\n\s*\n", document):
            for one in _sentences(place, paragraph):
                if one.words not in seen:
                    seen.add(one.words)
                    found.append(one)
    if len(found) < FEWEST:
        raise DataError(
            f"{source.name}: {len(found)} sentences of {WORDS[0]} to {WORDS[-1]} words, expected at least {FEWEST}",
            hint="give more prose, in a script with capitals and spaces between words",
        )
    return found


def _sentences(document: int, paragraph: str) -> Iterator[Sentence]:
    before: list[str] = []
    for text in _END.split(" ".join(paragraph.split())):
        words = text.split()
        if _is_prose(words):
            yield Sentence(document, " ".join(before), tuple(words))
        before = words if len(before) + len(words) > BEFORE else before + words
        if len(before) > BEFORE:
            before = []


def _is_prose(words: Sequence[str]) -> bool:
    if len(words) not in WORDS or not words[0].strip("\"'“(")[:1].isupper() or words[-1][-1] not in ".!?":
        return False
    return sum(_WORD.fullmatch(word) is not None for word in words) >= PROSE * len(words)


def _halves(one: Sentence) -> tuple[str, str]:
    middle = len(one.words) // 2
    return " ".join(one.words[:middle]), " ".join(one.words[middle:])


def _draw(found: Sequence[Sentence], purpose: str, size: int) -> list[Sentence]:
    order = list(range(len(found)))
    random.Random(derive_seed(0, purpose)).shuffle(order)
    return [found[place] for place in order[:size]]


def _name(task: str, source: TextSource) -> str:
    return task if source.name.startswith("python-prose") else f"{task}:{source.name}"


TEXT_TASKS: dict[str, Callable[[TextSource], LikelihoodTask]] = {
    "cloze": cloze,
    "word-order": word_order,
    "last-word": last_word,
}
