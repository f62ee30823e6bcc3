from __future__ import annotations

import subprocess
import sys

from luthier.data.files import PIECE_BYTES
from luthier.data.python_prose import python_prose
from luthier.data.sources import TextSource, open_source, split


def test_there_are_megabytes_of_distinct_documents() -> None:
    source = open_source("python-prose")
    assert source.num_bytes > 1_500_000
    assert len(source.documents) > 400
    assert len(set(source.documents)) == len(source.documents)
    assert max(map(len, source.documents)) < 5 * PIECE_BYTES


def test_docstrings_are_cleaned_and_in_the_order_of_the_file() -> None:
    argparse = next(document for document in python_prose() if document.startswith("Command-line parsing library\n"))
    formatter = argparse.index("Formatter for generating usage messages")
    assert 0 < formatter < argparse.index("Object for parsing command line strings into Python objects.")
    assert "\n    Only the name of this class is considered a public API" not in argparse


def test_no_paragraph_of_the_held_out_part_is_in_the_training_part() -> None:
    train, rest = split(open_source("python-prose"))
    known = {paragraph for document in train.documents for paragraph in document.split("\n\n")}
    held_out = [paragraph for document in rest.documents for paragraph in document.split("\n\n")]
    repeated = sum(len(paragraph) for paragraph in held_out if paragraph in known)
    assert repeated < 0.01 * sum(map(len, held_out))  # headings remain


def test_reading_the_library_imports_none_of_it() -> None:
    code = "import sys; from luthier.data.python_prose import python_prose; python_prose(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pydoc_data.topics" in modules
    assert not {"turtle", "tkinter", "torch", "transformers", "antigravity"} & set(modules)


def test_the_hash_follows_text_and_boundaries() -> None:
    assert TextSource("a", ("one", "two")).sha256 == TextSource("b", ["one", "two"]).sha256
    assert TextSource("a", ("one", "two")).sha256 != TextSource("a", ("onet", "wo")).sha256
    assert TextSource("a", ("\u00e9",)).num_bytes == 2
