"""A problem with its answer, and a named set of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.core.files import sha256_bytes

Kind = Literal["math", "exact", "sudoku", "choice"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is asked, and how an answer is compared with the right one.

    math: equal in value; exact: equal words; choice: a letter, or the text of that option (metadata `options`);
    sudoku: any grid that keeps the givens of metadata `puzzle` and the rules.
    """

    id: str
    prompt: str
    answer: str
    kind: Kind = "math"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A named set of problems."""

    name: str
    problems: Sequence[Problem]

    @property
    def sha256(self) -> str:
        """Of all prompts and answers in order: equal hashes mean the same benchmark."""
        rows = [[problem.id, problem.prompt, problem.answer, problem.kind] for problem in self.problems]
        return sha256_bytes(json.dumps(rows, ensure_ascii=True).encode())
