"""The English that every Python installation carries: the language reference and the standard library's docstrings.

About two megabytes of real technical prose, on every machine, under the PSF license, with nothing to download. The
library is read with `ast`, never imported, so reading it runs no code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from luthier.core.errors import DataError
from luthier.data.files import cut_paragraphs

MIN_CHARACTERS = 64  # a shorter docstring is a label, not prose
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


@functools.lru_cache(maxsize=1)
def python_prose() -> tuple[str, ...]:
    """All documents: one per topic of the language reference, then one per library module, in the order of names.

    Long ones are cut to pieces of about 8 kB, so that no single one rules the held-out part.
    A paragraph that repeats an earlier one (case, punctuation and layout aside) is dropped, and with it a passage of
    which less than half is left: the library quotes itself, which would carry training text into the held-out part.
    The text depends on the Python version; a corpus made of it is identified by its sha256.

    Raises: DataError when this Python comes without its library's sources.
    """
    seen: set[str] = set()
    documents = _language_reference(seen)
    for path in _library_files():
        passages = [passage for text in _docstrings(path) if (passage := _drop_repeats(text, seen))]
        if passages:
            documents.append("\n\n".join(passages) + "\n")
    return tuple(piece for document in documents for piece in cut_paragraphs(document))


def _language_reference(seen: set[str]) -> list[str]:
    from pydoc_data.topics import topics  # half a megabyte, needed only here

    # Long topics contain short ones: they come first, so that they stay whole.
    by_length = sorted(topics, key=lambda name: (-len(topics[name]), name))
    kept = {name: _drop_repeats(topics[name].strip(), seen) for name in by_length}
    return [kept[name] + "\n" for name in sorted(kept) if kept[name]]


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = sorted(path for path in files if not SKIPPED_FOLDERS.intersection(path.parts))
    if not kept:
        raise DataError(
            f"{root}: this Python has no library sources to read",
            hint="give a text file, a folder or a hub dataset as the corpus instead",
        )
    return [root / path for path in kept]


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module and everything in it, in the order of the file, as help() would show them."""
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
        tree = ast.parse(source)
    for node in _definitions(tree):
        text = ast.get_docstring(node, clean=False)
        if text is not None and len(cleaned := inspect.cleandoc(text).strip()) >= MIN_CHARACTERS:
            yield cleaned


def _definitions(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(
            child, ast.stmt | ast.ExceptHandler | ast.match_case
        ):  # expressions define nothing that has a docstring
            yield from _definitions(child)


def _drop_repeats(passage: str, seen: set[str]) -> str:
    """The passage without the paragraphs in `seen`, or '' if less than half is left; adds its paragraphs to `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", passage):
        key = re.sub(r"\W+", " ", paragraph).strip().lower()
        if key not in seen:
            kept.append(paragraph)
        if len(key) >= MIN_CHARACTERS:  # headings and one-line examples may come again
            seen.add(key)
    text = "\n\n".join(kept)
    return text if 2 * len(text) >= len(passage) else ""
