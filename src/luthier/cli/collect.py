"""`luthier collect`: a teacher's replies to a file of prompts, once, within caps: the data of distillation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from luthier.cli.models import identity, open_model, read_budget
from luthier.core.config import build, parse_yaml, to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError, EndpointError, Interrupted
from luthier.core.files import read_json, sha256_file, write_json, write_jsonl
from luthier.core.run import RunFolder
from luthier.data.files import missing_path, read_text
from luthier.data.formats import READERS
from luthier.distill.bracket_teacher import BracketBackend, BracketTeacher
from luthier.distill.teacher import (
    REPLIES,
    SPLITS,
    TERMS,
    Collected,
    Prompt,
    ReplyFolder,
    Row,
    Sampling,
    collect,
    missing,
    preferences,
    read_prompts,
)
from luthier.llm.budget import BudgetedBackend, most_of
from luthier.llm.cache import CachedBackend
from luthier.llm.endpoint import normalize_url
from luthier.llm.prices import Prices
from luthier.llm.types import Backend, Usage

BRACKETS = "brackets"
MAY_CHANGE = (
    "out",
    "device",
    "prompts",
    "samples",
    "budget",
    "prices",
    "at_once",
    "failed",
    "terms",
    "chosen",
    "cache",
)
LIMITS = {"max_calls": "max_calls", "max_tokens_total": "max_tokens", "max_cost": "max_cost"}


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Collect a teacher's replies. Writes replies.jsonl, and of it train, validation and test (kind completion)."""

    prompts: tyro.conf.Positional[str]
    """File of prompts: .jsonl or .parquet rows with prompt or messages, or .txt with one on each line; brackets:COUNT
    makes prompts for the teacher brackets."""
    model: str
    """The teacher's name on the server; without --endpoint a model folder or hub id, or brackets, a teacher that is
    known exactly (settings follow a colon: brackets:types=3,max_tokens=30)."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server (OPENAI_API_KEY is used if set); by default the model runs in this process."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/collect")
    """Folder for the replies; the same command again goes on where it stopped."""
    samples: int = 1
    """Replies to each prompt."""
    max_tokens: int = 1536
    """Longest reply in tokens; those that do not end before are dropped."""
    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    seed: int | None = None
    """Equal seeds give equal replies, of models in this process at least."""
    system: str | None = None
    """System message for prompts that have none; kept in the rows."""
    raw: bool = False
    """Prompts are texts to continue, without chat format."""
    validation: float = 0.05
    """Share of the prompts that goes to validation.jsonl."""
    test: float = 0.05
    """Share of the prompts that goes to test.jsonl."""
    budget: tuple[str, ...] = ()
    """Limits of the whole collection, kept before each request: calls=1000, tokens=2000000 (generated), dollars=5."""
    prices: Path | None = None
    """YAML file with dollars per million tokens, by model: NAME: {input: 0.05, output: 0.2}."""
    failed: float = 0.0
    """Share of replies that may be missing at the end because their calls failed."""
    at_once: int = 16
    """Requests in flight."""
    cache: Path | None = None
    """File that keeps replies for several collections, so that none pays twice."""
    terms: str = ""
    """What the teacher's terms of use say on training with its replies; kept in teacher.json."""
    chosen: Path | None = None
    """Folder of another collection with the same prompts: also write preferences: its replies chosen, these not."""
    device: str = "auto"
    """Where a model in this process runs: cpu, cuda, ...; auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.failed < 1:
            raise ConfigError(f"failed: got {self.failed}, expected 0 to less than 1", hint="0: none may be missing")
        if self.at_once < 1:
            raise ConfigError(f"at_once: got {self.at_once}, expected at least 1", hint="16 is usual")


def dry_run(config: CollectConfig, console: Console) -> None:
    """Print how many calls are left to make, and the most that they can cost."""
    prompts, repeated = open_prompts(config)
    sampling, price = sampling_of(config), _price(config)
    tasks = missing(_identity(config), prompts, sampling, ReplyFolder(config.out))
    total = sum((most_of(task.request) for task in tasks), Usage())
    dollars = price(config.model, total) if price else None
    table = {
        "prompts": len(prompts),
        "prompts that are repetitions": repeated,
        "replies that are there": len(prompts) * config.samples - sum(task.request.n for task in tasks),
        "calls at most": total.calls,
        "prompt tokens at most": total.prompt_tokens,
        "generated tokens at most": total.completion_tokens,
    }
    rows = [[name, f"{value:,}"] for name, value in table.items()]
    rows.append(["dollars at most", "unknown: give --prices" if dollars is None else f"{dollars:.2f}"])
    console.table(f"collect {config.prompts} from {config.model}", ["quantity", "value"], rows, TERMS)
    console.result({**table, "dollars at most": dollars})


def run(config: CollectConfig, console: Console) -> None:
    """Collect what is missing, then write the splits, teacher.json and the summary; an error when replies lack."""
    prompts, repeated = open_prompts(config)
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=MAY_CHANGE)) as folder:
        replies = ReplyFolder(folder.path)
        collected = asyncio.run(_collect(config, prompts, replies, console))
        splits = _write_splits(folder.path, collected.rows)
        pairs = _write_preferences(config, folder.path, collected.rows) if config.chosen else {}
        record = _record(config, prompts, repeated, collected, splits)
        write_json(folder.path / "teacher.json", record)
        tables = [_table(config, record, pairs)]
        for table in tables:
            console.table(**table)
        if not config.terms and not _is_brackets(config):
            console.status(f"note: {TERMS}")
        headline = {"replies": f"{len(collected.rows):,}", "from": config.model}
        folder.write_summary({"verb": "collect", "headline": headline, "tables": tables})
        console.result({**record, "preferences": pairs})
        check_complete(config, collected)


def open_prompts(config: CollectConfig) -> tuple[list[Prompt], int]:
    """The prompts of the file, or of the bracket teacher, and how many were repetitions. Raises: DataError."""
    name, colon, count = config.prompts.partition(":")
    made = bool(colon) and name == BRACKETS
    if made and not count.isdecimal():
        raise ConfigError(f"prompts: got {config.prompts!r}, expected brackets:COUNT", hint="brackets:512")
    rows = (
        [("brackets", {"prompt": text}) for text in open_brackets(config.model).prompts(int(count))]
        if made
        else _read_rows(Path(config.prompts).expanduser())
    )
    shares = (config.validation, config.test)
    prompts, repeated = read_prompts(rows, raw=config.raw or made, system=config.system, shares=shares)
    if not prompts:
        raise DataError(f"{config.prompts}: no prompts", hint='one on each line: {"prompt": "..."}')
    return prompts, repeated


def _read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.exists():
        raise missing_path(path)
    if path.suffix == ".txt":
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                yield f"{path} line {number}", {"prompt": line}
    elif path.suffix in READERS:
        for number, row in READERS[path.suffix](path):
            yield f"{path} row {number}", row
    else:
        known = ", ".join(["*.txt", *(f"*{suffix}" for suffix in READERS)])
        raise DataError(f"{path}: prompts are read from {known}", hint='one on each line: {"prompt": "..."}')


def open_brackets(name: str) -> BracketTeacher:
    """The bracket teacher that a name such as brackets:types=3,max_tokens=30 describes. Raises: ConfigError."""
    kind, _, settings = name.partition(":")
    if kind != BRACKETS:
        raise ConfigError(f"model: got {name!r} for prompts of the teacher brackets", hint="--model brackets")
    pairs = [text.partition("=") for text in settings.split(",") if text]
    return build(BracketTeacher, {key: parse_yaml(value, where=key) for key, _, value in pairs}, where="brackets:")


def sampling_of(config: CollectConfig) -> Sampling:
    """How the teacher is asked. Raises: ConfigError."""
    return Sampling(
        samples=config.samples,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )


def _is_brackets(config: CollectConfig) -> bool:
    return config.endpoint is None and config.model.partition(":")[0] == BRACKETS


def _identity(config: CollectConfig) -> str:
    """What names the teacher in the keys of replies: with its server, or the hash of its weights."""
    if _is_brackets(config):
        return open_brackets(config.model).model
    if config.endpoint is not None:
        return f"{config.model}@{normalize_url(config.endpoint)}"
    return identity(config.model)


def _open_teacher(config: CollectConfig, spent: Usage) -> Backend:
    """The teacher within the budget, of which `spent` is gone."""
    backend: Backend
    if _is_brackets(config):
        backend = BracketBackend(open_brackets(config.model))
    else:
        backend = open_model(config.model, endpoint=config.endpoint, device=config.device, concurrency=config.at_once)
    limits = limits_of(config.budget, "collecting")
    within = BudgetedBackend(backend, **limits, price=_price(config), spent=spent)
    return CachedBackend(within, config.cache, identity=_identity(config)) if config.cache else within


def _price(config: CollectConfig) -> Callable[[str, Usage], float | None] | None:
    return Prices.read(config.prices).cost if config.prices else None


def limits_of(budget: Sequence[str], what: str) -> dict[str, Any]:
    """Limits such as calls=40 as those of a `BudgetedBackend`; `what` spends it. Raises: ConfigError."""
    limits = read_budget(budget)
    if "max_seconds" in limits:
        raise ConfigError(f"budget: {what} has no limit in seconds", hint="use calls, tokens or dollars")
    return {LIMITS[name]: value for name, value in limits.items()}


async def _collect(
    config: CollectConfig, prompts: Sequence[Prompt], replies: ReplyFolder, console: Console
) -> Collected:
    backend = _open_teacher(config, replies.usage())
    try:
        with console.progress(len(prompts) * config.samples, "replies") as advance:
            return await collect(
                backend,
                prompts,
                sampling_of(config),
                replies,
                identity=_identity(config),
                at_once=config.at_once,
                advance=advance,
            )
    finally:
        await backend.aclose()


def _write_splits(folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """train.jsonl, validation.jsonl and test.jsonl, as far as there are rows for them."""
    return {split: _write(folder / f"{split}.jsonl", [r for r in rows if r["split"] == split]) for split in SPLITS}


def _write_preferences(config: CollectConfig, folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    assert config.chosen is not None
    if not (config.chosen / REPLIES).is_file():
        raise DataError(f"{config.chosen} holds no replies", hint="give the --out of another luthier collect")
    chosen = [row for row in ReplyFolder(config.chosen).rows.values() if "dropped" not in row]
    pairs = list(preferences(chosen, rows))
    if not pairs:
        raise DataError(
            f"{config.chosen} has no other reply to any of these prompts", hint="collect both with the same prompts"
        )
    names = {split: folder / f"preferences-{split}.jsonl" for split in SPLITS}
    return {split: _write(path, [r for r in pairs if r["split"] == split]) for split, path in names.items()}


def _write(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Write rows, or remove an older file where there are none: a file without rows is an error to its readers."""
    if not rows:
        path.unlink(missing_ok=True)
        return {"rows": 0, "prompts": 0, "sha256": ""}
    count, sha256 = write_jsonl(path, rows)
    return {"rows": count, "prompts": len({row["id"] for row in rows}), "sha256": sha256}


def _record(
    config: CollectConfig,
    prompts: Sequence[Prompt],
    repeated: int,
    collected: Collected,
    splits: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What teacher.json says: who was asked, how, when, at what price, and what came of it."""
    price, path = _price(config), config.out / "teacher.json"
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    usage = sum((Usage(**row["usage"]) for row in ReplyFolder(config.out).rows.values()), Usage())
    return {
        "model": config.model,
        "identity": _identity(config),
        "endpoint": config.endpoint,
        "begun": read_json(path)["begun"] if path.exists() else now,
        "date": now,
        "sampling": {**to_mapping(sampling_of(config)), "system": config.system, "raw": config.raw},
        "prompts": {"file": config.prompts, "sha256": _sha256(config), "different": len(prompts), "repeated": repeated},
        "counts": {
            "kept": len(collected.rows),
            "dropped": dict(collected.dropped),
            "failed": collected.failed,
            "left": collected.left,
            "stopped": collected.stopped,
        },
        "usage": vars(usage),
        "prices": Prices.read(config.prices).table.get(config.model) if config.prices else None,
        "dollars": price(config.model, usage) if price else None,
        "splits": splits,
        "terms": config.terms or TERMS,
    }


def _sha256(config: CollectConfig) -> str | None:
    path = Path(config.prompts).expanduser()
    return sha256_file(path) if path.is_file() else None


def _table(config: CollectConfig, record: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    counts, usage = record["counts"], record["usage"]
    rows = [["kept", f"{counts['kept']:,}"]]
    rows += [[f"dropped: {reason}", f"{count:,}"] for reason, count in counts["dropped"].items()]
    rows += [[name, f"{counts[name]:,}"] for name in ("failed", "left") if counts[name]]
    rows += [[f"{split}.jsonl", f"{part['rows']:,}"] for split, part in record["splits"].items()]
    rows += [[f"preferences-{split}.jsonl", f"{part['rows']:,}"] for split, part in pairs.items()]
    rows += [["prompt tokens", f"{usage['prompt_tokens']:,}"], ["generated tokens", f"{usage['completion_tokens']:,}"]]
    if record["dollars"] is not None:
        rows.append(["dollars", f"{record['dollars']:.4f}"])
    note = "Dropped: replies that did not end by themselves. All replies of a prompt are in one split."
    return {"title": f"{config.model}: replies", "columns": ["replies", "number"], "rows": rows, "note": note}


def check_complete(config: CollectConfig, collected: Collected) -> None:
    """Raise what keeps a collection from being complete: Interrupted for a budget, EndpointError for failed calls."""
    wanted = len(collected.rows) + sum(collected.dropped.values()) + collected.failed + collected.left
    lacking, errors = collected.failed + collected.left, collected.errors
    saved = f"what there is stands in {config.out}"
    if collected.failed > config.failed * wanted:
        raise EndpointError(
            f"{lacking:,} of {wanted:,} replies are missing, {collected.failed:,} because calls failed: {errors[0]}",
            hint=f"{errors[0].hint}; then run the same command again, it asks only for these ({saved})",
        )
    if collected.left:
        raise Interrupted(
            f"{collected.stopped}: {lacking:,} of {wanted:,} replies are missing",
            hint=f"raise the budget and run the same command again ({saved})",
        )
