r"""Reading what models write: lists of steps, scores, tagged passages. Nothing is evaluated, nothing is guessed.

Models put LaTeX into JSON with single backslashes, leave trailing commas and forget quotes around fractions; all of
this is read as it was meant. (The published code lets `\frac` become a form feed.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from luthier.reason.prompts import Step
from luthier.tasks.answers import extract_answer, final_text

# What follows a backslash in a JSON string and is LaTeX although JSON would read an escape. \b and \f always are:
# nobody writes backspaces and form feeds.
_LATEX = (
    r"n(?=e(?![a-z])|eq|eg|u(?![a-z])|abla|mid|ot|parallel|ewline)"
    r"|t(?=imes|ext|an|heta|au|frac|o(?![a-z])|op|ilde|riangle|herefore|binom)"
    r"|r(?=ight|ho|angle|m(?![a-z])|oot|floor|ceil|vert)"
    r"|[bf]"
)
_BACKSLASH = re.compile(rf'\\(?:(?P<keep>["\\/]|u[0-9a-fA-F]{{4}})|(?P<latex>{_LATEX})|(?P<escape>[nrt])|)')
_BARE_VALUE = re.compile(r'("(?:answer|a)"\s*:\s*)([^"\s\[{][^,}\]\n]*)')
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_PAIR = re.compile(r"^\s*(?:\d+[.)]\s*)?Q:\s*(.+?)\s*\n\s*A:\s*(.+?)\s*$", re.MULTILINE)
_INTEGER = re.compile(r"[-\u2212]?\d+")
_QUESTION_KEYS = ("question", "sub_question", "sub-question", "description", "q")
_ANSWER_KEYS = ("answer", "sub_answer", "sub-answer", "a")


class Unreadable(ValueError):
    """A reply that is not in the form asked for; the message says what is wrong with it, for the model to mend."""


def read_steps(reply: str) -> list[Step]:
    """The steps of a decomposition, from JSON or from `Q:`/`A:` lines. Raises: Unreadable."""
    text = final_text(reply)
    if "{" not in text and "Q:" in text:
        steps = [Step(question, answer) for question, answer in _PAIR.findall(text)]
    else:
        steps = [Step(*pair) for pair, _ in _entries(text)]
    if not steps:
        raise Unreadable("it lists no steps")
    return steps


def read_dependencies(reply: str) -> list[tuple[Step, tuple[int, ...]]]:
    """Steps with the indices (from 0) of the earlier steps that each uses. Raises: Unreadable."""
    found = []
    for number, (pair, entry) in enumerate(_entries(final_text(reply))):
        listed = entry.get("depends", entry.get("depend", ()))
        numbers = [int(str(item)) for item in listed if re.fullmatch(r"\d+", str(item))] if listed else []
        found.append((Step(*pair), tuple(sorted({item for item in numbers if item < number}))))
    if not found:
        raise Unreadable("it lists no steps")
    return found


def _entries(text: str) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    value = _json(text)
    if isinstance(value, Mapping):
        value = next((item for item in value.values() if isinstance(item, list)), [])
    entries = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            raise Unreadable(f"entry {number} is not an object")
        question, answer = _first(entry, _QUESTION_KEYS), _first(entry, _ANSWER_KEYS)
        if not question or not answer:
            raise Unreadable(f"entry {number} has no {'question' if not question else 'answer'}")
        entries.append(((question, answer), entry))
    return entries


def _first(entry: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        if isinstance(value := entry.get(key), str | bool):
            return str(value).strip()
    return ""


def _json(text: str) -> Any:
    """The first JSON object or list in the text, numbers as they are written."""
    escaped = _BACKSLASH.sub(_escape, text)
    mended = _TRAILING_COMMA.sub(r"\1", _BARE_VALUE.sub(_quote, escaped))
    decoder = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=str)
    problem = "there is no JSON in it"
    for candidate in (escaped, mended):
        for start in [match.start() for match in re.finditer(r"[\[{]", candidate)][:20]:
            try:
                value = decoder.raw_decode(candidate, start)[0]
            except (json.JSONDecodeError, RecursionError) as error:
                problem = f"the JSON is not valid ({error})"
                continue
            if _is_list_of_entries(value):
                return value
            problem = "it lists no steps"
    raise Unreadable(problem)


def _is_list_of_entries(value: Any) -> bool:
    """Whether this is the whole and not one of its entries: a list of objects, or an object with a list."""
    if isinstance(value, dict):
        return any(isinstance(item, list) for item in value.values())
    return bool(value) and isinstance(value[0], dict)


def _escape(match: re.Match[str]) -> str:
    return match.group() if match["keep"] or match["escape"] else "\\" + match.group()


def _quote(match: re.Match[str]) -> str:
    value = match[2].strip()
    return match[1] + (value if value in ("true", "false", "null") else json.dumps(value))


def read_score(reply: str, high: int) -> int | None:
    """A whole number 0 to `high` given as the answer or as the whole reply; None when there is none or it is -1."""
    stated = extract_answer(reply)
    text = final_text(reply).strip() if stated is None else stated
    match = _INTEGER.match(text) if stated is not None else _INTEGER.fullmatch(text)
    if match is None or len(match.group()) > 9:
        return None
    score = int(match.group().replace("\u2212", "-"))
    return score if 0 <= score <= high else None


def read_tag(reply: str, name: str) -> str | None:
    """What stands in the last <name> ... </name>, or None."""
    found = re.findall(rf"<{name}>(.*?)</{name}>", final_text(reply), re.DOTALL)
    return found[-1].strip() or None if found else None


def after_evaluation(reply: str) -> str:
    """The solution that follows the first evaluation (up to a second one), or the whole reply without one."""
    text = final_text(reply)
    if "<evaluation>" not in text or "</evaluation>" not in text:
        return text
    return text.split("</evaluation>")[1].strip()
