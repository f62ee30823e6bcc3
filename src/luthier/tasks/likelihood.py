"""Tasks that are decided by how likely a model finds given texts: nothing is generated.

An item has options, each a text after a context, of which one is right. Three kinds:

* choice: which of several endings, or of several beginnings, is right (ARC, HellaSwag, PIQA, WinoGrande);
* pair: which of two texts is likelier (BLiMP);
* target: whether the model writes just this text, greedily, and how likely it finds it (LAMBADA).

Rows of a `.jsonl` or `.parquet` file, with optional `id`, `metadata` and, but for pairs, `separator`:

| kind   | fields                   |                                                                   |
|--------|--------------------------|-------------------------------------------------------------------|
| choice | context, choices, label  | `label` is the right one's place, counted from 0                  |
| choice | contexts, target, label  | the same ending after several beginnings                          |
| pair   | good, bad                | two texts of their own; BLiMP's sentence_good, sentence_bad too   |
| target | context, target          | the text that should follow                                       |

Between a context and what follows stands the separator, a space unless the row says otherwise, except where either
has white space at the border already or the context is empty. The separator is scored with what follows it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import ConfigError, DataError
from luthier.core.files import sha256_bytes
from luthier.core.seeds import derive_seed
from luthier.data.files import missing_path
from luthier.data.formats import READERS

LikelihoodKind = Literal["choice", "pair", "target"]
COLUMNS: dict[tuple[str, ...], LikelihoodKind] = {
    ("context", "choices", "label"): "choice",
    ("contexts", "target", "label"): "choice",
    ("good", "bad"): "pair",
    ("sentence_good", "sentence_bad"): "pair",
    ("context", "target"): "target",
}
ROWS_HINT = "such rows have the fields " + ", or ".join(" + ".join(fields) for fields in COLUMNS)
BETWEEN_EXAMPLES = "\n\n"


@dataclass(frozen=True)
class Option:
    """A text that is scored after a context, both as the model reads them."""

    context: str
    text: str

    @property
    def whole(self) -> str:
        """Context and text as one."""
        return self.context + self.text

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text without the white space around it, at least 1."""
        return max(1, len(self.text.strip().encode()))


@dataclass(frozen=True, kw_only=True)
class Item:
    """Options, and the place of the right one; a target is the only option."""

    id: str
    options: tuple[Option, ...]
    label: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of everything that decides the scores, in 16 hexadecimal digits."""
        parts = [[option.context, option.text] for option in self.options]
        return sha256_bytes(json.dumps([parts, self.label], ensure_ascii=True).encode())[:16]


@dataclass(frozen=True)
class LikelihoodTask:
    """A named set of items of one kind."""

    name: str
    kind: LikelihoodKind
    items: Sequence[Item]

    @property
    def sha256(self) -> str:
        """Of all items in order: equal hashes mean the same benchmark, examples in front of the contexts included."""
        return sha256_bytes(json.dumps([self.kind, *([item.id, item.digest] for item in self.items)]).encode())


def joined(context: str, text: str, separator: str = " ") -> Option:
    """A text after its context, with the separator between them where there is no white space yet."""
    if not context or context[-1].isspace() or text[:1].isspace():
        return Option(context, text)
    return Option(context, separator + text)


def add_examples(
    task: LikelihoodTask, count: int, *, pool: LikelihoodTask | None = None, seed: int = 0
) -> LikelihoodTask:
    """The task with `count` solved items in front of every context, drawn for each item by the seed.

    They come from `pool`, or else from the task itself, where an item is never an example of itself.
    Raises: ConfigError for pairs, which have no context, and when there are too few items to draw from.
    """
    if count == 0:
        return task
    if task.kind == "pair":
        raise ConfigError(f"{task.name}: pairs have no context for examples", hint="leave out --shots for this task")
    given = (pool or task).items
    if len(given) - (pool is None) < count:
        raise ConfigError(f"{task.name}: {len(given)} items give no {count} examples", hint="lower --shots")
    items = []
    for number, item in enumerate(task.items):
        others = range(len(given)) if pool else [n for n in range(len(given)) if n != number]
        drawn = random.Random(derive_seed(seed, "examples", task.name, item.id)).sample(others, count)
        before = "".join(given[n].options[given[n].label].whole + BETWEEN_EXAMPLES for n in drawn)
        options = tuple(Option(before + option.context, option.text) for option in item.options)
        items.append(replace(item, options=options))
    return replace(task, items=items)


def is_likelihood_file(path: Path) -> bool:
    """Whether the first row of a file has the fields of an item here."""
    if path.suffix not in READERS or not path.exists():
        return False
    first = next(iter(READERS[path.suffix](path)), None)
    return first is not None and _kind_of(first[1]) is not None


def read_items(path: Path) -> LikelihoodTask:
    """The items of a `.jsonl` or `.parquet` file. Raises: DataError naming file and row for what does not fit."""
    if not path.exists():
        raise missing_path(path)
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: items are read from {' or '.join(READERS)}, got {path.suffix or 'no suffix'}", hint=ROWS_HINT
        )
    items, kind = list[Item](), None
    for number, row in READERS[path.suffix](path):
        where = f"{path} row {number}"
        found = _kind_of(row)
        if found is None:
            columns = ", ".join(map(str, row)) or "no fields"
            raise DataError(f"{where}: no item to score, got {columns}", hint=ROWS_HINT)
        if kind not in (None, found):
            raise DataError(f"{where}: a {found} row among {kind} rows", hint="one kind of rows a file")
        kind = found
        items.append(_item(row, str(row.get("id", number)), where))
    if kind is None:
        raise DataError(f"{path}: no rows", hint="one JSON object per line is expected")
    if len({item.id for item in items}) < len(items):
        raise DataError(f"{path}: two rows have the same id", hint="give every row an id of its own, or none")
    return LikelihoodTask(path.stem, kind, items)


def _kind_of(row: Mapping[str, Any]) -> LikelihoodKind | None:
    """The kind of the first set of columns that the row has: a target row has no label."""
    return next((kind for columns, kind in COLUMNS.items() if all(name in row for name in columns)), None)


def _item(row: Mapping[str, Any], name: str, where: str) -> Item:
    options, label = _options(row, where), 0
    if len(options) > 1 and "label" in row:
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
            raise DataError(
                f"{where}: label is {label!r}, expected a whole number from 0 to {len(options) - 1}",
                hint="the place of the right choice, counted from 0",
            )
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DataError(f"{where}: metadata is {metadata!r}, expected an object", hint="leave it out")
    return Item(id=name, options=options, label=label, metadata=metadata)


def _options(row: Mapping[str, Any], where: str) -> tuple[Option, ...]:
    separator = _string(row.get("separator", " "), "separator", where, empty=True)
    if "choices" in row:
        context = _string(row["context"], "context", where, empty=True)
        return tuple(joined(context, text, separator) for text in _strings(row["choices"], "choices", where))
    if "contexts" in row:
        target = _string(row["target"], "target", where)
        return tuple(joined(context, target, separator) for context in _strings(row["contexts"], "contexts", where))
    if "target" in row:
        context = _string(row["context"], "context", where, empty=True)
        return (joined(context, _string(row["target"], "target", where), separator),)
    names = ("good", "bad") if "good" in row else ("sentence_good", "sentence_bad")
    return tuple(Option("", _string(row[name], name, where)) for name in names)


def _strings(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise DataError(f"{where}: {name} is {value!r}, expected a list of two or more texts", hint=ROWS_HINT)
    return [_string(text, name, where) for text in value]


def _string(value: Any, name: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or (not empty and not value.strip()):
        expected = "a text" if empty else "a text that is not blank"
        raise DataError(f"{where}: {name} is {value!r}, expected {expected}", hint=ROWS_HINT)
    return value
