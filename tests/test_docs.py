"""The documents say what is there: links lead somewhere, commands exist, and so do the functions that are named."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from luthier.cli.main import OPTIONS, VERBS, load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    if path.is_file()
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
# A command is in a code block (also after a prompt, `python -m`, or torchrun's options) or in backticks.
COMMAND = re.compile(r"(?:^|[`$\s/])luthier[ \t]+([a-z][\w-]*)([^`\n|#&;]*)", re.MULTILINE)
FUNCTION = re.compile(r"\bluthier(?:\.\w+)+")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives the headings of a document."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for pair in LINK.findall(text):
        target, _, fragment = "".join(pair).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (document.parent / target) if target else document
        if not file.exists() or (
            fragment
            and file.suffix == ".md"
            and fragment not in anchors(text if file == document else file.read_text())
        ):
            broken.append("".join(pair))
    return broken


def code_of(text: str) -> str:
    """Fenced blocks, with continued lines joined, and what is between backticks."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join(re.sub(r"\\\n\s*", " ", part) for part in [*blocks, *spans])


def wrong_commands(text: str) -> list[str]:
    wrong = []
    for verb, rest in COMMAND.findall(code_of(text)):
        if verb not in VERBS:
            wrong.append(f"luthier {verb}")
            continue
        names = {field.name.replace("_", "-") for field in dataclasses.fields(load_config(verb))}
        known = {*(f"--{name}" for name in names), *(f"--no-{name}" for name in names), *OPTIONS, "--config", "--help"}
        wrong += [f"luthier {verb} {flag}" for flag in re.findall(r"(?<!\S)--[\w-]+", rest) if flag not in known]
    return wrong


def exists(dotted: str) -> bool:
    """Whether luthier.package.module.name can be imported and looked up."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[cut:]:
                found = getattr(found, name)
        except AttributeError:
            return False
        return True
    return False


def is_name(dotted: str) -> bool:
    """Not a file such as luthier.json."""
    return dotted.rpartition(".")[2] not in ("json", "md", "py", "yaml", "git", "org")


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document, document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_exist(document: Path) -> None:
    assert not wrong_commands(document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_functions_exist(document: Path) -> None:
    names = sorted(set(filter(is_name, FUNCTION.findall(document.read_text()))))
    assert not [name for name in names if not exists(name)]


def test_the_table_of_papers_names_code_and_tests() -> None:
    papers = ROOT / "docs" / "papers.md"
    if not papers.exists():
        pytest.skip("docs/papers.md is not written yet")
    text = papers.read_text()
    assert FUNCTION.search(text)
    named = re.findall(r"\btests/[\w/]+\.py(?:::\w+)?", text)
    missing = [name for name in named if not is_test(name)]
    assert named
    assert not missing


def is_test(name: str) -> bool:
    file, _, function = name.partition("::")
    return (ROOT / file).is_file() and (not function or f"def {function}(" in (ROOT / file).read_text())


def test_the_checks_find_what_is_wrong() -> None:
    text = (
        "# A head, line\n[x](absent.md) [y](#a-head-line) [z](#none) [w](https://x.org)\n"
        "```sh\nluthier pretrian --x\nluthier pretrain --steps 3 \\\n  --stesp 4\npython -m luthier env --json\n```\n"
        "`luthier eval MODEL --no-compressors`, luthier makes models."
    )
    assert broken_links(ROOT / "README.md", text) == ["absent.md", "#none"]
    assert wrong_commands(text) == ["luthier pretrian", "luthier pretrain --stesp"]
    assert exists("luthier.core.stats.wilson")
    assert exists("luthier.core.run.RunFolder.open")
    assert not exists("luthier.core.stats.wilsen")
    assert not exists("luthier.nothing.here")
