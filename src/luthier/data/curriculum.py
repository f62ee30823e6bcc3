"""The rows of a model's whole life in miniature, from word problems and stories.

Two stages of text, which differ in their share of problems; conversations, answered by worked solutions and bare
answers; pairs to prefer one of, which differ in style or in being right; prompts to practice on; tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from luthier.core.errors import ConfigError
from luthier.core.seeds import derive_seed
from luthier.data.problems import is_held_out
from luthier.data.word_problems import Calculation, WordProblem, calculate, calculations, is_positive, write_worked

Row = dict[str, Any]
Contrast = Literal["style", "mistake"]
TRIES = 100


def mixed_texts(
    problems: Iterable[WordProblem], stories: Iterable[str], characters: int, maths: float, seed: int
) -> list[Row]:
    """Rows of kind `text` in random order, about `characters` long together; one document is a problem or a story.

    maths: share of the characters that problems take. Each row says in `part` which of the two it is.
    """
    if not 0 <= maths <= 1:
        raise ConfigError(f"share of maths: got {maths}, expected 0 to 1", hint="0.08 in stage 1 and 0.6 in stage 2")
    solved = (f"{problem.question}\n{problem.worked}" for problem in problems)
    rows = [{"text": text, "part": "problem"} for text in _up_to(solved, characters * maths)]
    rows += [{"text": text, "part": "story"} for text in _up_to(stories, characters * (1 - maths))]
    random.Random(derive_seed(seed, "order of texts")).shuffle(rows)
    return rows


def _up_to(texts: Iterable[str], characters: float) -> Iterator[str]:
    length = 0
    iterator = iter(texts)
    while length < characters:
        text = next(iterator)
        length += len(text)
        yield text


def chat_row(problem: WordProblem, *, bare: bool) -> Row:
    """A conversation of kind `messages`: the question, and its solution or its answer alone."""
    messages = [*_asked(problem), _reply(problem.bare if bare else problem.worked)]
    return {"messages": messages, "style": "bare" if bare else "worked"}


def preference_row(problem: WordProblem, contrast: Contrast, rng: random.Random, held_pairs: float) -> Row:
    """A row of kind `preference`. The chosen reply is the worked solution.

    contrast: `style`, when the rejected reply is the bare answer; `mistake`, when it goes wrong (`write_mistaken`).
    """
    rejected = problem.bare if contrast == "style" else write_mistaken(problem, rng, held_pairs)
    return {
        "prompt": _asked(problem),
        "chosen": [_reply(problem.worked)],
        "rejected": [_reply(rejected)],
        "contrast": contrast,
    }


def write_mistaken(problem: WordProblem, rng: random.Random, held_pairs: float) -> str:
    """A worked solution with a wrong answer: a slip in one step, a step too few, or a step too many.

    So it may be shorter or longer than the right one. No held-out calculation comes up in it.
    Raises: ConfigError when none is found.
    """
    right = calculations(problem.expression)
    for _ in range(TRIES):
        wrong = rng.choice((_slip, _too_few, _too_many))(problem, right, rng)
        is_new = bool(wrong) and wrong[-1][-1] != right[-1][-1] and is_positive(wrong)
        if is_new and not any(is_held_out((sign, a, b), held_pairs) for sign, a, b, _ in wrong):
            return write_worked(wrong)
    raise ConfigError(f"no mistake fits {problem.question!r}", hint="hold out fewer calculations")


def _slip(problem: WordProblem, right: list[Calculation], rng: random.Random) -> list[Calculation]:
    amount = rng.choice((-10, -2, -1, 1, 2, 10))
    return calculations(problem.expression, {rng.randrange(len(right)): amount})


def _too_few(problem: WordProblem, right: list[Calculation], rng: random.Random) -> list[Calculation]:
    return right[:-1]


def _too_many(problem: WordProblem, right: list[Calculation], rng: random.Random) -> list[Calculation]:
    sign, _, operand, result = right[-1]
    return [*right, (sign, result, operand, calculate(sign, result, operand))]


def _asked(problem: WordProblem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def _reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
