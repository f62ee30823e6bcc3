"""`luthier gauge REPLIES REPLIES … --judge NAME`: which replies to the same prompts a third model prefers.

Verdicts are kept in judge.sqlite of the run folder, so the same command goes on where it stopped, and a further set of
replies costs its own verdicts only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.cli.collect import limits_of
from luthier.cli.models import identity, open_model
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import DataError, Interrupted
from luthier.core.run import RunFolder
from luthier.data.formats import read_rows
from luthier.data.row_source import turns
from luthier.distill import prompts
from luthier.distill.judge import JudgeSettings, Pair, Verdict, compare, first_requests, length_controlled, matched
from luthier.llm.budget import BudgetedBackend, BudgetSpent, most_of
from luthier.llm.cache import CachedBackend
from luthier.llm.endpoint import normalize_url
from luthier.llm.prices import Prices
from luthier.llm.types import Backend, Usage

if TYPE_CHECKING:
    from luthier.cli.gauge import GaugeConfig

VERDICTS = "judge.sqlite"
MAY_CHANGE = ("out", "device", "models", "samples", "budget", "prices", "at_once")
Replies = Mapping[str, Sequence[str]]


class Duel(NamedTuple):
    """A set of replies against the first set."""

    name: str
    pairs: list[Pair]
    left_out: int
    """Prompts that only one of the two has replies to."""


def planned(config: GaugeConfig) -> list[list[str]]:
    """Calls, tokens and dollars, of which what is in the run folder already costs nothing."""
    settings = _settings(config)
    requests = first_requests([pair for duel in duels_of(config)[1] for pair in duel.pairs], settings)
    once = sum(map(most_of, requests), Usage())
    most = sum([once] * settings.tries, Usage())
    rows = [
        ["calls, where every verdict can be read at once", f"{once.calls:,}"],
        ["calls at most", f"{most.calls:,}"],
        ["prompt tokens at most", f"{most.prompt_tokens:,}"],
        ["generated tokens at most", f"{most.completion_tokens:,}"],
    ]
    if config.prices is None:
        return rows
    dollars = Prices.read(config.prices).cost(config.judge or "", most)
    told = f"unknown: {config.judge} is not in {config.prices}" if dollars is None else f"{dollars:.2f}"
    return [*rows, ["dollars at most", told]]


def run(config: GaugeConfig, console: Console) -> None:
    """Ask for what is missing, then print the tables. Raises: Interrupted when the budget is spent."""
    from luthier.report.html import write_report

    first, duels = duels_of(config)
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        try:
            verdicts, usage = asyncio.run(_ask(config, duels, folder.path / VERDICTS, console))
        except BudgetSpent as error:
            raise Interrupted(
                f"{error}: verdicts are missing, and no figure is given of a part",
                hint=f"raise the budget and run the same command again (what there is stands in {config.out})",
            ) from error
        tables = [_figures(config, first, duels, verdicts), _grounds(first, duels, verdicts)]
        for table in tables:
            console.table(**table)
        headline = {f"{duel.name} against {first}": verdicts[duel.name].rate.text() for duel in duels}
        folder.write_summary({"verb": "gauge", "headline": headline, "tables": tables})
        report = write_report(folder.path)
        console.print(f"report: {report}")
        told = {duel.name: _values(duel, verdicts[duel.name]) for duel in duels}
        console.result({"against": first, "sets": told, "usage": vars(usage), "report": str(report)})


def duels_of(config: GaugeConfig) -> tuple[str, list[Duel]]:
    """The first set's name, and every other set against it. Raises: DataError where no prompt is in both."""
    sets = [replies_of(Path(name).expanduser(), config.split) for name in config.models]
    names = _names(config.models)
    duels = []
    for name, other in list(zip(names, sets, strict=True))[1:]:
        shared = [prompt for prompt in sets[0] if prompt in other]
        if not shared:
            raise DataError(
                f"{name} and {names[0]} have no prompt in common",
                hint="collect both with the same file of prompts, the same system message and the same shares",
            )
        pairs = [
            Pair(_asked(prompt), mine, theirs)
            for prompt in shared
            for mine, theirs in list(zip(other[prompt], sets[0][prompt], strict=False))[: config.samples]
        ]
        duels.append(Duel(name, pairs, len(sets[0].keys() ^ other.keys())))
    return names[0], duels


def replies_of(path: Path, split: str) -> Replies:
    """The replies to each prompt (as JSON of its messages), in the order of the file. Raises: DataError."""
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{file}: missing, expected replies", hint=f"give a folder of luthier collect with --{split} above 0"
        )
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(file, "completion"), 1):
        said = turns("assistant", row["completion"])
        if len(said) != 1:
            raise DataError(f"{file} row {number}: got {len(said)} messages, expected one reply", hint="split them")
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in turns("user", row["prompt"])]
        found.setdefault(json.dumps(asked), []).append(said[0]["content"])
    return found


def _asked(prompt: str) -> str | list[dict[str, Any]]:
    """A key of `replies_of` as a judge is shown it: a single question without its role."""
    messages: list[dict[str, Any]] = json.loads(prompt)
    return messages[0]["content"] if [turn["role"] for turn in messages] == ["user"] else messages


def _names(paths: Sequence[str]) -> list[str]:
    """Short names that differ: of a folder its own, of a file its folder's and its own."""
    given = [Path(path) for path in paths]
    short = [f"{path.parent.name}/{path.name}" if path.is_file() else path.name for path in given]
    return [name if short.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(short, 1)]


def _settings(config: GaugeConfig) -> JudgeSettings:
    return JudgeSettings(max_tokens=config.max_tokens, at_once=config.at_once, seed=config.seed)


async def _ask(
    config: GaugeConfig, duels: Sequence[Duel], store: Path, console: Console
) -> tuple[dict[str, Verdict], Usage]:
    """The verdict on each set, and what it cost now."""
    backend = _open(config, store)
    try:
        with console.progress(sum(len(duel.pairs) for duel in duels), "pairs") as advance:
            settings = _settings(config)
            found = {duel.name: await compare(backend, duel.pairs, settings, advance=advance) for duel in duels}
        return found, backend.usage
    finally:
        await backend.aclose()


def _open(config: GaugeConfig, store: Path) -> Backend:
    """The judge within its budget, of which all that the store has paid for is gone."""
    name = config.judge or ""
    price = Prices.read(config.prices).cost if config.prices else None
    inner = open_model(name, endpoint=config.endpoint, device=config.device, concurrency=config.at_once)
    within = BudgetedBackend(inner, **limits_of(config.budget, "a judge"), price=price)
    known_as = identity(name) if config.endpoint is None else f"{name}@{normalize_url(config.endpoint)}"
    cached = CachedBackend(within, store, identity=known_as)
    within.spent = cached.stored()
    return cached


def _figures(config: GaugeConfig, first: str, duels: Sequence[Duel], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    rows = []
    for duel in duels:
        verdict = verdicts[duel.name]
        at_equal, equal = length_controlled(verdict.judgements), matched(verdict.judgements)
        rows.append(
            [
                duel.name,
                verdict.rate.text(),
                "unknown" if at_equal is None else at_equal.text(),
                "none" if equal is None else f"{equal.text()} ({equal.n} prompts)",
                *(f"{count:,}" for count in (verdict.wins, verdict.ties, verdict.losses)),
            ]
        )
    columns = ["replies", "win rate", "length-controlled", "of about equal length", "wins", "ties", "losses"]
    note = (
        f"Each pair in both orders, a tie counts half; 0.5 is no difference; 95 % intervals over prompts. "
        f"Length-controlled: what a logistic fit leaves at equal lengths. Words of the judge's task: version "
        f"{prompts.VERSION}."
    )
    return {"title": f"{config.judge} judges: against {first}", "columns": columns, "rows": rows, "note": note}


def _grounds(first: str, duels: Sequence[Duel], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    rows = []
    for duel in duels:
        verdict, (mine, theirs) = verdicts[duel.name], _lengths(duel.pairs)
        counts = [f"{count:,}" for count in (len(duel.pairs), duel.left_out, verdict.unread)]
        habits = [f"{verdict.consistent:.3f}", f"{verdict.first_shown:.3f}"]
        rows.append([duel.name, *counts, f"{mine:.1f}", f"{theirs:.1f}", *habits])
    columns = ["replies", "pairs", "prompts left out", "unread", "length", f"of {first}", "consistent", "shown first"]
    note = (
        "Lengths in characters. Left out: prompts with replies in one set only. Unread: no verdict in one of the "
        "orders. Consistent: pairs with the same outcome in both. Shown first: points of what is, 0.5 without a habit."
    )
    return {"title": "What it rests on", "columns": columns, "rows": rows, "note": note}


def _lengths(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean characters of both sides."""
    return sum(len(pair.first) for pair in pairs) / len(pairs), sum(len(pair.second) for pair in pairs) / len(pairs)


def _values(duel: Duel, verdict: Verdict) -> dict[str, Any]:
    mine, theirs = _lengths(duel.pairs)
    at_equal = length_controlled(verdict.judgements)
    return {
        "win_rate": verdict.rate.value,
        "interval": [verdict.rate.low, verdict.rate.high],
        "prompts": verdict.rate.n,
        "length_controlled": None if at_equal is None else at_equal.value,
        "wins": verdict.wins,
        "ties": verdict.ties,
        "losses": verdict.losses,
        "unread": verdict.unread,
        "length": mine,
        "other_length": theirs,
        "consistent": verdict.consistent,
        "first_shown": verdict.first_shown,
    }
