"""The table at the end of a recipe: what each evaluation found, and how far it is from the one that it is `against`."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from luthier.core.run import RunFolder
from luthier.core.stats import Interval, paired_difference
from luthier.tasks.runner import read_answers

if TYPE_CHECKING:
    from luthier.cli.run import Stage

COLUMNS = ["evaluation", "of", "n", "value", "against", "difference"]
NOTE = (
    "Values have the interval of their own table. Difference: this evaluation minus that one, on the same n problems "
    "(of repeated ones the mean), with a 95 % bootstrap over problems. All of one run: the intervals do not say how "
    "far another seed may be from it."
)
Shares = dict[tuple[str, str], dict[tuple[str, str], float]]  # by task and method: share of correct answers by problem


def evaluations(stages: Sequence[Stage]) -> dict[str, Any] | None:
    """The table of all finished stages of the verb `eval`; None where there are fewer than two, which says nothing."""
    names = {stage.folder.resolve(): stage.name for stage in stages}
    found = [stage for stage in stages if stage.verb == "eval"]
    if len(found) < 2:
        return None
    rows = [row for stage in found for row in _rows(stage, names)]
    return {"title": "All evaluations", "columns": COLUMNS, "rows": rows, "note": NOTE}


def _rows(stage: Stage, names: Mapping[Path, str]) -> list[list[str]]:
    headline: Mapping[str, str] = RunFolder.read(stage.folder).summary.get("headline", {})
    other: Path | None = stage.config.against
    pairs = differences(stage.folder, other) if other is not None else {}
    beside = "—" if other is None else names.get(other.resolve(), str(other))
    shared = set.intersection(*(set(_settings(key)) for key in headline)) if headline else set()
    return [
        [stage.name, _short(key, shared), _counted(pairs.get(key)), value, beside, _difference(pairs.get(key))]
        for key, value in headline.items()
    ]


def _short(key: str, shared: Container[str]) -> str:
    """'test, cot:temperature=0.0' without the method's settings that all methods beside it share."""
    settings = _settings(key)
    own = ",".join(setting for setting in settings if setting not in shared)
    head = key.removesuffix(":" + ",".join(settings))
    return f"{head}:{own}" if own else head


def _settings(key: str) -> list[str]:
    """Of the method in 'test, cot:temperature=0.0', one by one; none where the key names no method."""
    _, comma, method = key.rpartition(", ")
    settings = method.partition(":")[2] if comma else ""
    return settings.split(",") if settings else []


def _counted(pair: Interval | None) -> str:
    return "—" if pair is None else f"{pair.n:,}"


def _difference(pair: Interval | None) -> str:
    return "—" if pair is None else signed(pair)


def signed(difference: Interval) -> str:
    """'+0.120 [+0.080, +0.160]'."""
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def differences(ours: Path, theirs: Path) -> dict[str, Interval]:
    """By 'task, method': the share of correct answers in one run folder minus that in another, on the same problems.

    95 % bootstrap over problems; of a problem that was solved several times, the mean counts. Empty where neither has
    answers to the same problem.
    """
    mine, others = _shares(ours), _shares(theirs)
    found = {}
    for (task, method), problems in mine.items():
        other = others.get((task, method), {})
        both = [problem for problem in problems if problem in other]
        if both:
            pair = paired_difference([problems[problem] for problem in both], [other[problem] for problem in both])
            found[f"{task}, {method}"] = pair
    return found


def _shares(folder: Path) -> Shares:
    """A failed answer counts as wrong. A problem is known by its id and the hash of its wording."""
    right: dict[tuple[str, str], dict[tuple[str, str], list[bool]]] = {}
    for (task, problem, method, _), row in read_answers(folder / "answers.jsonl").items():
        attempts = right.setdefault((task, method), {}).setdefault((problem, row["sha256"]), [])
        attempts.append(row["status"] == "correct")
    return {key: {problem: fmean(tried) for problem, tried in some.items()} for key, some in right.items()}
