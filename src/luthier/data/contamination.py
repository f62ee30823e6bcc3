"""Whether texts give away what they are to be tested on: runs of words shared with the rows of test sets.

Words are letters and digits, in lower case; punctuation and space do not count. A test row is hit when any run of `n`
of its words (13, as is usual) stands in a text. A row of fewer words is looked for as a whole. Apart from that, a row
counts as `whole` when a text is the same row, word for word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WORD = re.compile(r"[^\W_]+")
Row = tuple[str, int]
"""The name of a test set and the place of a row in it, from 0."""


@dataclass(frozen=True)
class Contamination:
    """What texts and one test set have in common."""

    name: str
    rows: int
    hits: int
    """Rows of which a run of words stands in a text."""
    whole: int
    """Rows that are a text, word for word."""
    examples: tuple[str, ...]
    """The first few rows that are hit or whole."""

    @property
    def share(self) -> float:
        """Rows hit, as a share of all."""
        return self.hits / self.rows if self.rows else 0.0


class RunIndex:
    """The runs of words of test sets, to look texts up in."""

    def __init__(self, tests: Mapping[str, Iterable[str]], n: int = 13) -> None:
        """tests: by name, the rows. n: words in a run; 0 for whole rows alone."""
        self.n = n
        self.tests = {name: list(rows) for name, rows in tests.items()}
        self._runs: dict[int, dict[str, list[Row]]] = {}
        self._whole: dict[str, list[Row]] = {}
        for name, rows in self.tests.items():
            for place, text in enumerate(rows):
                self._add(text, (name, place))

    def _add(self, text: str, row: Row) -> None:
        words = normalize(text)
        self._whole.setdefault(" ".join(words), []).append(row)
        length = min(self.n, len(words))
        if length:
            found = self._runs.setdefault(length, {})
            for run in runs(words, length):
                found.setdefault(run, []).append(row)

    def find(self, text: str) -> tuple[set[Row], set[Row]]:
        """The test rows of which a run of words stands in the text, and those that the text is, word for word."""
        words = normalize(text)
        hits: set[Row] = set()
        for length, known in self._runs.items():
            for run in known.keys() & set(runs(words, length)):
                hits.update(known[run])
        return hits, set(self._whole.get(" ".join(words), ()))


def normalize(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def runs(words: list[str], n: int) -> Iterable[str]:
    """All runs of n words, each as one string."""
    return (" ".join(words[start : start + n]) for start in range(len(words) - n + 1))


def check_contamination(texts: Iterable[str], index: RunIndex, *, examples: int = 3) -> list[Contamination]:
    """What texts and each test set have in common; `examples` of the rows in question are quoted."""
    hits: set[Row] = set()
    whole: set[Row] = set()
    for text in texts:
        found, same = index.find(text)
        hits |= found
        whole |= same
    return [
        Contamination(
            name=name,
            rows=len(rows),
            hits=sum(test == name for test, _ in hits),
            whole=sum(test == name for test, _ in whole),
            examples=tuple(rows[place] for test, place in sorted(hits | whole) if test == name)[:examples],
        )
        for name, rows in index.tests.items()
    ]
