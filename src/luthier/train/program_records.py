"""What became of each problem and of each new problem made from it: one record each, from first to last.

A sample carries its own values, question, answer and solution, so that nothing can be paired with what belongs to
another. The rows for training and the counts at the gates are read off the records at the end, in the order of the
given problems: they do not depend on what was made first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from luthier.data.contamination import normalize
from luthier.tasks.task import Problem
from luthier.train.program_numbers import write_answer

PROBLEM_GATES = {
    "question": "a numeric answer and numbers in the question, not seen before, not kept out",
    "naming": "every number named or left alone",
    "program": "the program gives the known answer, exactly",
}
SAMPLE_GATES = {
    "values": "new values of the same sign and size",
    "calculation": "the program ends with an answer of the same kind",
    "retelling": "the same numbers in a new question",
    "reading": "read again, every number has the same role and value",
    "solution": "solved to the program's answer, exactly",
    "distinct": "no other accepted question is the same",
}


@dataclass
class Sample:
    """A new problem on its way through the gates. `gate` and `reason` say where and why it was stopped, if it was."""

    round: int
    index: int
    values: dict[str, Fraction] = field(default_factory=dict)
    answer: Fraction | None = None
    question: str = ""
    solution: str = ""
    gate: str = ""
    reason: str = ""

    @property
    def is_accepted(self) -> bool:
        """Whether it was solved and nothing stopped it."""
        return bool(self.solution) and not self.gate

    def stop(self, gate: str, reason: str) -> None:
        """Note that it fails at a gate."""
        self.gate, self.reason = gate, reason

    def to_json(self) -> dict[str, Any]:
        """As it stands in problems.jsonl."""
        values = {name: str(value) for name, value in self.values.items()}
        return vars(self) | {"values": values, "answer": None if self.answer is None else str(self.answer)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        """The record of a row."""
        values = {name: Fraction(value) for name, value in row["values"].items()}
        return cls(**{**row, "values": values, "answer": None if row["answer"] is None else Fraction(row["answer"])})


@dataclass
class Outcome:
    """A given problem, the program found for it (empty: none), and the samples made from it.

    `failure`: why it is not finished; such records are not kept, and the next run goes on with the problem.
    """

    problem: str
    digest: str
    program: str = ""
    values: dict[str, str] = field(default_factory=dict)
    """The names of its numbers with the values that they have in it."""
    namings: int = 0
    programs: int = 0
    gate: str = ""
    reason: str = ""
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @property
    def accepted(self) -> list[Sample]:
        """The samples that passed every gate so far."""
        return [sample for sample in self.samples if sample.is_accepted]

    def stop(self, gate: str, reason: str) -> None:
        """Note that nothing can be made of the problem, for now."""
        self.gate, self.reason = gate, reason

    def to_json(self) -> dict[str, Any]:
        """As it stands in problems.jsonl."""
        return vars(self) | {"samples": [sample.to_json() for sample in self.samples]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Outcome:
        """The record of a row."""
        return cls(**{**row, "samples": [Sample.from_json(sample) for sample in row["samples"]]})


class Rows(NamedTuple):
    """What is written at the end."""

    accepted: list[dict[str, Any]]
    texts: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


def question_key(question: str) -> str:
    """Equal for questions that differ in case, space and punctuation only."""
    return " ".join(normalize(question))


def collect(outcomes: Sequence[Outcome]) -> Rows:
    """All rows, in order. Of questions that are the same, the first stays; the records of the others say so."""
    rows = Rows([], [], [])
    seen: set[str] = set()
    for outcome in outcomes:
        if outcome.gate:
            rows.rejected.append({"parent": outcome.problem, "gate": outcome.gate, "reason": outcome.reason})
        for sample in outcome.samples:
            if sample.is_accepted:
                key = question_key(sample.question)
                if key in seen:
                    sample.stop("distinct", "made from another problem too")
                seen.add(key)
            if sample.gate:
                rows.rejected.append(_rejected(outcome, sample))
            elif sample.is_accepted:
                rows.accepted.append(_accepted(outcome, sample))
                rows.texts.append({"text": f"{sample.question}\n{sample.solution}"})
    return rows


def _accepted(outcome: Outcome, sample: Sample) -> dict[str, Any]:
    assert sample.answer is not None
    return {
        "id": _sample_id(outcome, sample),
        "prompt": sample.question,
        "answer": write_answer(sample.answer),
        "metadata": {
            "parent": outcome.problem,
            "round": sample.round,
            "program": outcome.program,
            "parameters": _written(sample.values),
            "solution": sample.solution,
        },
    }


def _rejected(outcome: Outcome, sample: Sample) -> dict[str, Any]:
    return {
        "id": _sample_id(outcome, sample),
        "parent": outcome.problem,
        "gate": sample.gate,
        "reason": sample.reason,
        "round": sample.round,
        "parameters": _written(sample.values),
        "prompt": sample.question,
        "answer": None if sample.answer is None else write_answer(sample.answer),
    }


def _sample_id(outcome: Outcome, sample: Sample) -> str:
    return f"{outcome.problem}-{sample.round}-{sample.index}"


def _written(values: Mapping[str, Fraction]) -> dict[str, str]:
    return {name: write_answer(value) for name, value in values.items()}


def gate_rows(outcomes: Sequence[Outcome]) -> list[list[Any]]:
    """gate, in, passed, share, what it asks for. What a stopped run has not decided is not counted."""
    problems = [outcome.gate for outcome in outcomes if outcome.gate or outcome.program]
    samples = [s.gate for outcome in outcomes for s in outcome.samples if s.gate or s.solution]
    rows: list[list[Any]] = []
    for gates, stops in ((PROBLEM_GATES, problems), (SAMPLE_GATES, samples)):
        left = len(stops)
        stopped = Counter(stops)
        for gate, meaning in gates.items():
            passed = left - stopped[gate]
            rows.append([gate, left, passed, f"{passed / left:.1%}" if left else "-", meaning])
            left = passed
    return rows


def reason_rows(rows: Iterable[Mapping[str, Any]], most: int = 20) -> list[list[Any]]:
    """gate, reason, count: the most common reasons. A reason ends at its colon: what follows is about one case."""
    counts = Counter((row["gate"], row["reason"].partition(":")[0]) for row in rows)
    return [[gate, reason, count] for (gate, reason), count in counts.most_common(most)]


def growth(outcomes: Iterable[Outcome]) -> float | None:
    """Geometric mean of new over old absolute values, over the changed numbers of accepted problems; None: none."""
    logs = []
    for outcome in outcomes:
        old = {name: Fraction(text) for name, text in outcome.values.items()}
        for sample in outcome.accepted:
            logs += [math.log(value / old[name]) for name, value in sample.values.items() if value != old[name]]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def digest_parts(problem: Problem) -> list[str]:
    """What a record depends on, of the problem itself."""
    return [problem.id, problem.prompt, problem.answer]
