r"""The answer in a reply, and what can be said of two answers without algebra. Exact, quick, and never raising.

Nothing is executed. (The published scorer `eval`s replies, turns whatever it cannot read into 0, and so finds prose
right where 0 is the answer and `$70$` wrong where 70 is.)
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

LONGEST_NUMBER = 200
"""Characters; anything longer is not read as a number."""

_BOXED = re.compile(r"\\boxed\s*(?=\{)")
_STATED = re.compile(
    r"(?:####|(?:^|(?<=[.\n]))\W{0,4}(?:the\s+)?(?:final\s+)?answer(?:\s+is\b\s*:?|\s*:))[ \t*]*(?P<answer>\S[^\n]*)",
    re.IGNORECASE,
)
_INTEGER = r"\d+|\d{1,3}(?:,\d{3})+"
_DECIMAL = rf"(?:(?:{_INTEGER})(?:\.\d*)?|\.\d+)"
_SIGNED = re.compile(rf"(?P<sign>[-+]?)\s*(?P<value>{_DECIMAL})")
_RATIO = re.compile(rf"(?P<sign>[-+]?)\s*(?P<above>{_DECIMAL})\s*/\s*(?P<below>[-+]?\s*{_DECIMAL})")
_FRAC = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d{1,9})?\s*\\[dtc]?frac\s*"
    r"(?:\{\s*(?P<above>[-+]?[\d.,\s]+?)\s*\}|(?P<one>\d))\s*(?:\{\s*(?P<below>[-+]?[\d.,\s]+?)\s*\}|(?P<two>\d))"
)
_MIXED = re.compile(r"(?P<sign>[-+]?)\s*(?P<whole>\d{1,9})\s+(?P<above>\d{1,9})\s*/\s*(?P<below>\d{1,9})")
_NAME = re.compile(r"^\\?[A-Za-z](?:_\{?\w{1,4}\}?)?\s*(?:=|\\approx)\s*(?=\S)")
_UNIT = re.compile(
    r"(?<=[\d}.])\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\s[A-Za-z]{2,}[A-Za-z ]*"
    r"|\s?(?:cm|mm|km|kg|mg|ft|in|mph|[mgs])(?:\^?\{?[23]\}?)?)\s*$"
)
_WRAPPERS = (
    (re.compile(r"^\\boxed\s*\{(.*)\}$", re.DOTALL), r"\1"),
    (re.compile(r"^\$+(.*?)\$*$", re.DOTALL), r"\1"),
    (re.compile(r"^\\[(\[](.*)\\[)\]]$", re.DOTALL), r"\1"),
    (re.compile(r"^\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}$", re.DOTALL), r"\1"),
    (re.compile(r"^\*+(.*?)\*+$", re.DOTALL), r"\1"),
    (re.compile(r"^`+(.*?)`+$", re.DOTALL), r"\1"),
)
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\\left(?=[(\[|.\\])|\\right(?=[)\]|.\\])|\\\$|\s+")
_WORDS = re.compile(r"[^\W_]+(?:[\s'.-]+[^\W_]+)*", re.UNICODE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CONSTANTS = frozenset({"inf", "infinity", "sqrt"})


def final_text(reply: str) -> str:
    """What follows the last </think>. A thought that never ended leaves nothing."""
    before, closed, after = reply.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in reply else before + after


def extract_answer(reply: str) -> str | None:
    """The answer that a reply states, or None.

    The last <answer> tag; else the last \\boxed; else the last "Answer: x", "The answer is x" or "#### x".
    """
    text = final_text(reply)
    lower = text.lower()
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0 and len(lower) == len(text):
        return text[start + len("<answer>") : end].strip() or None
    for match in reversed(list(_BOXED.finditer(text))[-20:]):
        if (inside := _braced(text, match.end())) is not None:
            return inside.strip() or None
    if stated := list(_STATED.finditer(text)):
        return stated[-1]["answer"].strip().rstrip("*").rstrip(".").strip() or None
    return None


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    return None


def strip_wrapping(answer: str) -> str:
    r"""An answer without what only dresses it: $...$, \boxed, \text, spacing commands, a final full stop."""
    text = answer.strip().replace("\u2212", "-")
    for _ in range(4):
        before = text
        for pattern, inside in _WRAPPERS:
            text = pattern.sub(inside, text).strip()
        if len(text) > 1 and text.endswith(".") and not text.endswith(".."):
            text = text[:-1].strip()
        if text == before:
            break
    return _SPACES.sub(" ", text).strip()


def number(answer: str) -> Fraction | None:
    r"""The exact value of a plain number: 070, 1,000, .5, 3/4, \frac34, 1 1/2, x=70, $70$, 70^\circ, 12 cm, 5%.

    A per cent sign is a unit here: 5% is 5. None for everything else.
    """
    return None if len(answer) > LONGEST_NUMBER else _number(answer)


@functools.lru_cache(maxsize=4096)  # the votes of a step are often the same few answers
def _number(answer: str) -> Fraction | None:
    text = _NAME.sub("", strip_wrapping(answer), count=1)
    text = strip_wrapping(_UNIT.sub("", text)).removeprefix("$").strip()
    try:
        return _fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _fraction(text: str) -> Fraction | None:
    if match := _SIGNED.fullmatch(text):
        return _signed(match["sign"], _plain(match["value"]))
    if match := _RATIO.fullmatch(text):
        return _signed(match["sign"], _plain(match["above"]) / _plain(match["below"]))
    if match := _MIXED.fullmatch(text):
        return _signed(match["sign"], int(match["whole"]) + Fraction(int(match["above"]), int(match["below"])))
    if match := _FRAC.fullmatch(text):
        above, below = match["above"] or match["one"], match["below"] or match["two"]
        return _signed(match["sign"], int(match["whole"] or 0) + _plain(above) / _plain(below))
    return None


def _plain(text: str) -> Fraction:
    if not text.isascii():
        raise ValueError("digits of other scripts are not read")
    return Fraction(re.sub(r"[,\s]", "", text).rstrip("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def normalize(answer: str) -> str:
    """One spelling for answers that differ in dress only: '70', '32/29'; words in lower case without articles."""
    value = number(answer)
    if value is not None:
        return str(value)
    text = strip_wrapping(answer)
    words = re.sub(r"[.,;:!?\"'()]", " ", text).strip()
    if _WORDS.fullmatch(words) and not (any(c.isdigit() for c in text) and words != text):
        plain = " ".join(_ARTICLES.sub(" ", words.lower()).replace("-", " ").split())
        return plain or words.lower()  # "A" is an article only beside other words
    return re.sub(r"\s+", "", text)


def same_quick(a: str, b: str) -> bool | None:
    """Whether two answers mean the same where that is certain without algebra; None otherwise."""
    if a == b:
        return True
    first, second = number(a), number(b)
    if first is not None and second is not None:
        return first == second
    one, two = normalize(a), normalize(b)
    if one == two:
        return True
    if (first is not None or _is_words(one)) and (second is not None or _is_words(two)):
        return False
    return None


def _is_words(text: str) -> bool:
    """Whether a normalized answer is plain language, so that no algebra could make it equal to another spelling."""
    words = text.split()
    return all(word.isalpha() for word in words) and any(len(word) > 2 and word not in _CONSTANTS for word in words)
