"""What `luthier eval --tasks` shows of solved problems: accuracy, pass@k over repeats, and pairs of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.stats import Interval, mcnemar, paired_difference
from luthier.tasks.metrics import accuracy, flips, pass_at_k_over
from luthier.tasks.runner import Row
from luthier.tasks.task import Task

if TYPE_CHECKING:
    from luthier.cli.eval import EvalConfig

COLUMNS = ["method", "correct", "95 % interval", "n", "unread", "failed", "tokens", "calls", "mended", "broken"]
NOTE = (
    "Correct: of all problems, where a failed call counts as wrong. Interval: Wilson, over problems. Unread: no answer "
    "found, or one that cannot be compared in time. Tokens, calls: generated tokens and requests for a problem, mean. "
    "Mended, broken: answers that later rounds turned right and wrong."
)
REPEATED = NOTE.replace("Wilson, over problems", "bootstrap over problems, each solved several times; n: attempts")
PASS_NOTE = (
    "pass@k: chance that one of k samples is correct, unbiased from all samples (Chen et al. 2021). maj@k: of a vote "
    "over k samples. Both are means over problems with 95 % bootstrap intervals over problems. Mixed: share of the "
    "problems with correct and other samples, from which reinforcement learning can learn."
)
Votes = Mapping[str, Interval]


def solved_tables(
    task: Task, by_method: Mapping[str, list[Row]], votes: Votes, config: EvalConfig
) -> Iterator[dict[str, Any]]:
    """The tables of a task: its methods, pass@k where it was repeated, groups by metadata, and methods in pairs."""
    title = f"{task.name}: {len(task.problems)} problems, {config.model}, seed {config.seed}"
    lines, note = [_line(m, r) for m, r in by_method.items()], REPEATED if config.repeats > 1 else NOTE
    yield {"title": title, "columns": COLUMNS, "rows": lines, "note": note}
    if config.repeats > 1:
        yield _passes(task, by_method, votes, config.repeats)
    if config.by:
        groups = {problem.id: group(problem.metadata, config.by) for problem in task.problems}
        lines = [
            [*values, *_line(method, [row for row in rows if groups[row["problem"]] == values])]
            for values in dict.fromkeys(groups.values())
            for method, rows in by_method.items()
        ]
        columns = [*config.by.split(","), *COLUMNS]
        yield {"title": f"{task.name} by {config.by}", "columns": columns, "rows": lines, "note": ""}
    if len(by_method) > 1:
        yield _differences(task, by_method) if config.repeats > 1 else _pairs(task, by_method)


def group(metadata: Mapping[str, Any], by: str) -> tuple[str, ...]:
    """The values of the fields that `by` names, separated by commas; 'none' for one that is missing."""
    return tuple(str(metadata.get(field, "none")) for field in by.split(","))


def solved_numbers(by_method: Mapping[str, list[Row]], votes: Votes) -> dict[str, Any]:
    """The same for --json."""
    numbers: dict[str, Any] = {}
    for method, rows in by_method.items():
        result, costs = accuracy([row["status"] for row in rows]), [row.get("cost") for row in rows]
        numbers[method] = {
            "accuracy": overall(rows)._asdict(),
            "completed": result.completed._asdict() if result.completed else None,
            "statuses": result.statuses,
            "completion_tokens": mean(rows, "completion_tokens"),
            "prompt_tokens": mean(rows, "prompt_tokens"),
            "calls": mean(rows, "calls"),
            "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
        }
        correct, n = _correct(rows)
        if n > 1:
            numbers[method] |= {f"pass@{k}": pass_at_k_over(correct, n, k)._asdict() for k in _ks(n)}
            numbers[method][f"maj@{n}"] = votes[method]._asdict()
    return numbers


def overall(rows: Sequence[Row]) -> Interval:
    """Share of correct answers: Wilson over problems, or a bootstrap over problems that were solved several times."""
    correct, n = _correct(rows)
    return accuracy([row["status"] for row in rows]).overall if n == 1 else pass_at_k_over(correct, n, 1)


def mean(rows: Sequence[Row], name: str) -> float:
    """Of the rows that have the value; 0 without any."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else 0.0


def _correct(rows: Sequence[Row]) -> tuple[list[int], int]:
    """How many samples of each problem are correct, and how many it has."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["problem"]] = counts.get(row["problem"], 0) + (row["status"] == "correct")
    return list(counts.values()), len(rows) // len(counts)


def _ks(n: int) -> list[int]:
    """1, 2, 4, … below n, and n."""
    return [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def _line(method: str, rows: Sequence[Row]) -> list[str]:
    share, counts = overall(rows), accuracy([row["status"] for row in rows]).statuses
    answered = [row for row in rows if row["status"] != "failed"]
    mended, broken = flips(
        [row["first_status"] == "correct" for row in answered], [row["status"] == "correct" for row in answered]
    )
    return [
        method,
        f"{share.value:.3f}",
        f"[{share.low:.3f}, {share.high:.3f}]",
        str(len(rows)),
        str(counts.get("unparsed", 0) + counts.get("timeout", 0)),
        str(counts.get("failed", 0)),
        f"{mean(answered, 'completion_tokens'):.0f}",
        f"{mean(answered, 'calls'):.1f}",
        str(mended),
        str(broken),
    ]


def _passes(task: Task, by_method: Mapping[str, list[Row]], votes: Votes, repeats: int) -> dict[str, Any]:
    lines = []
    for method, rows in by_method.items():
        correct, n = _correct(rows)
        mixed = sum(0 < count < n for count in correct) / len(correct)
        passes = [pass_at_k_over(correct, n, k).text() for k in _ks(n)]
        lines.append([method, *passes, votes[method].text(), f"{mixed:.3f}"])
    return {
        "title": f"{task.name}: {len(task.problems)} problems, {repeats} samples of each",
        "columns": ["method", *(f"pass@{k}" for k in _ks(repeats)), f"maj@{repeats}", "mixed"],
        "rows": lines,
        "note": PASS_NOTE,
    }


def _pairs(task: Task, by_method: Mapping[str, list[Row]]) -> dict[str, Any]:
    lines = []
    for first, second in _two(by_method):
        test = mcnemar(*([row["status"] == "correct" for row in by_method[name]] for name in (first, second)))
        lines.append([first, second, str(test.only_first), str(test.only_second), f"{test.p:.2g}"])
    columns = ["first", "second", "only first correct", "only second correct", "p (exact McNemar)"]
    return {"title": f"{task.name}: the same problems, pair by pair", "columns": columns, "rows": lines, "note": ""}


def _differences(task: Task, by_method: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Samples of one problem are no independent pairs, so the difference is taken between problems."""
    lines = []
    for first, second in _two(by_method):
        (one, n), (two, m) = _correct(by_method[first]), _correct(by_method[second])
        difference = paired_difference([count / n for count in one], [count / m for count in two])
        lines.append([first, second, difference.text()])
    columns = ["first", "second", "first minus second, with a 95 % bootstrap over problems"]
    return {"title": f"{task.name}: the same problems, pair by pair", "columns": columns, "rows": lines, "note": ""}


def _two(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = list(names)
    return [(first, second) for index, first in enumerate(listed) for second in listed[index + 1 :]]
