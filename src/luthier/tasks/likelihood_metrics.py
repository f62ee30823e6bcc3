"""What scores of options say: which one a model prefers, by four measures, and how often that is right.

Scores are log-probabilities in nats. The measures:

* sum: of the whole text; favours short options;
* token: divided by the number of tokens; depends on the tokenizer;
* byte: divided by UTF-8 bytes; compares models with different tokenizers (acc_norm and acc_bytes elsewhere);
* unconditional: minus the log-probability of the same text after nothing, which is what the context adds.

An option counts as chosen only if it beats all others: a model that finds all alike is right nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.stats import Interval, bootstrap_mean, wilson
from luthier.tasks.likelihood import LikelihoodKind

MEASURES = ("sum", "token", "byte", "unconditional")
PRIMARY: dict[LikelihoodKind, str] = {"choice": "byte", "pair": "sum", "target": "greedy"}


def chosen(values: Sequence[float]) -> int | None:
    """The place of the largest value; None where the two largest are equal, or a value is no number."""
    best = max(values)
    found = [place for place, value in enumerate(values) if value == best]
    return found[0] if len(found) == 1 and not any(map(math.isnan, values)) else None


def measured(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The value of every option by each measure, from a row with logprobs, tokens, bytes and maybe unconditional."""
    logprobs = row["logprobs"]
    values = {
        "sum": list(logprobs),
        "token": [value / count for value, count in zip(logprobs, row["tokens"], strict=True)],
        "byte": [value / count for value, count in zip(logprobs, row["bytes"], strict=True)],
    }
    if row.get("unconditional"):
        values["unconditional"] = [with_ - alone for with_, alone in zip(logprobs, row["unconditional"], strict=True)]
    return values


def is_right(row: Mapping[str, Any], measure: str) -> bool:
    """Whether the right option of a scored row is chosen; by the measure greedy, whether the model would write it."""
    if row["status"] == "failed":
        return False
    if measure == "greedy":
        return bool(row["greedy"][row["gold"]])
    return chosen(measured(row)[measure]) == row["gold"]


@dataclass(frozen=True)
class Result:
    """Accuracy by each measure, where a failed item counts as wrong, and what guessing would give.

    `perplexity`: of targets only, exp of the mean nats of a whole target; its interval is a bootstrap over items.
    """

    accuracy: Mapping[str, Interval]
    chance: float
    failed: int
    perplexity: Interval | None = None


def summarize(kind: LikelihoodKind, rows: Sequence[Mapping[str, Any]]) -> Result:
    """The result of a task from its rows. ValueError without any."""
    scored = [row for row in rows if row["status"] != "failed"]
    names = [PRIMARY[kind]] if kind == "target" else _measures(scored)
    accuracy = {name: wilson(sum(is_right(row, name) for row in rows), len(rows)) for name in names}
    shares = [1 / row["options"] for row in rows] if kind != "target" else [0.0]
    return Result(
        accuracy, sum(shares) / len(shares), len(rows) - len(scored), _perplexity(scored) if kind == "target" else None
    )


def _measures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that every row has."""
    always = MEASURES[:-1]
    return [*always, MEASURES[-1]] if rows and all(row.get(MEASURES[-1]) for row in rows) else list(always)


def _perplexity(rows: Sequence[Mapping[str, Any]]) -> Interval | None:
    if not rows:
        return None
    nats = bootstrap_mean([-row["logprobs"][0] for row in rows], resamples=2000)
    return Interval(math.exp(nats.value), math.exp(nats.low), math.exp(nats.high), nats.n)
