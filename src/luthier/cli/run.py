"""`luthier run RECIPE`: a YAML list of `verb: settings` stages, one run folder each. What is done is skipped.

A stage's key is its verb, or `verb name` where a verb occurs twice. Its `say` is told before it runs. A setting that
starts with `@name/` is a path inside the folder of that earlier stage, with `@/` inside the stage's own folder, with
`@python/` inside the standard library of this Python, whose texts every machine has.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from luthier.cli.main import VERBS, load_config
from luthier.cli.run_summary import evaluations
from luthier.core import config as config_
from luthier.core.console import Console
from luthier.core.errors import ConfigError, did_you_mean, require
from luthier.core.files import read_json, sha256_file, write_json
from luthier.core.run import RunFolder, holds_work

STAGE_VERBS = tuple(name for name, verb in VERBS.items() if not verb.alone)
REFERENCE = re.compile(r"([a-z-]+:)?@(.+)")
STAGE_NAME = re.compile(r"[A-Za-z0-9_-]+")
PYTHON = "python"
WRITTEN = ("out", "html", "jsonl", "trace")
"""Settings that name what a verb writes; what the others name, it reads."""
WIDEST = 100  # characters of a line of prose
SHOWN = 60  # characters of a value, at most, in the headline of a verb that has no summary of its own


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run the stages of a recipe in order, each in a numbered folder under --out."""

    recipe: tyro.conf.Positional[Path]
    """YAML file: a list of stages; recipes/NAME.yaml also finds those that come with luthier."""
    out: Path | None = None
    """Folder of the whole run; by default runs/ and the recipe's name."""
    set: tuple[str, ...] = ()
    """Changes such as pretrain.steps=100 (stage name, setting, value)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe, checked. `needs` are the earlier stages that its settings point to."""

    name: str
    verb: str
    folder: Path
    values: dict[str, Any]
    config: Any
    needs: tuple[str, ...]
    say: str = ""
    """What happens and why, for those who watch."""

    @property
    def done(self) -> Path:
        """Written when the stage has ended: its hash, settings, seconds, processor seconds, and result."""
        return self.folder / "stage.json"


def run(config: RunConfig, console: Console) -> None:
    """Run the recipe's stages that are not done, then write its report."""
    run_recipe(find_recipe(config.recipe), _folder(config), config.set, console)


def _folder(config: RunConfig) -> Path:
    return config.out or Path("runs") / config.recipe.stem


def find_recipe(path: Path) -> Path:
    """The recipe file: as given, or one that comes with luthier (recipes/NAME.yaml works from any folder)."""
    shipped = recipe_folder() / (path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path)
    return shipped if not path.exists() and shipped.is_file() else path


def recipe_folder() -> Path:
    """The recipes: inside an installed package, or at the root of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"


def dry_run(config: RunConfig, console: Console) -> None:
    """Check every stage, and print what the ones that can tell would cost."""
    results: dict[str, dict[str, Any]] = {}
    stages = read_recipe(find_recipe(config.recipe), _folder(config), config.set)
    folders = {stage.name: stage.folder for stage in stages}
    for stage in stages:
        console.print(f"{stage.folder.name}: {stage.verb}, settings are valid")
        module, of_stage = importlib.import_module(VERBS[stage.verb].module), StageConsole(console)
        waiting = [name for name in stage.needs if not folders[name].exists()]
        if hasattr(module, "dry_run") and waiting:
            console.print(f"  what it costs is known once {' and '.join(waiting)} has run")
        elif hasattr(module, "dry_run"):
            module.dry_run(stage.config, of_stage)
        results[stage.name] = of_stage.values
    console.result({"stages": results})


def run_recipe(
    recipe: Path, out: Path, changes: Sequence[str], console: Console, *, without: Container[str] = ()
) -> None:
    """Run a recipe file into `out`; stages that are done are skipped.

    without: names of stages that are left out, which the same recipe may run later.

    Raises ConfigError where there is work of other inputs, of settings that its verb cannot change, or of no stage.
    """
    stages = read_recipe(recipe, out, changes)
    described = {"recipe": recipe.name, "stages": {stage.folder.name: {stage.verb: stage.values} for stage in stages}}
    hashes = _hashes(stages)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first rank alone writes
        with _joined():
            _run_stages(stages, hashes, console, without, mark=False)
        return
    _check_work(stages, hashes, out)
    with contextlib.closing(RunFolder.open(out, described, may_change=described)) as folder:
        with _joined():
            _run_stages(stages, hashes, console, without, mark=True)
        results = {s.name: RunFolder.read(s.folder).summary for s in stages if s.done.exists()}
        summary = _summary(results)
        if table := evaluations([stage for stage in stages if stage.name in results]):
            summary["tables"].insert(0, table)
            console.table(**table)
        folder.write_summary(summary)
        from luthier.report.html import write_report

        report = write_report(out)
        console.print(f"report: {report}")
        console.result({"stages": results, "report": str(report)})


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Under torchrun, one process group for all stages."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    from luthier.learn.parallel import ranks

    with ranks():
        yield


def _hashes(stages: Sequence[Stage]) -> dict[str, str]:
    """By a stage's name: the hash of its settings, of the files and folders that they name, and of what it needs."""
    hashes: dict[str, str] = {}
    for stage in stages:
        hashes[stage.name] = _hash(stage, stage.values, hashes)
    return hashes


def _hash(stage: Stage, values: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    read = {key: value for key, value in values.items() if key not in WRITTEN}
    return config_.digest([stage.verb, values, [hashes[name] for name in stage.needs], _inputs(read)])


def _check_work(stages: Sequence[Stage], hashes: Mapping[str, str], out: Path) -> None:
    """Refuse to leave or to mix what is done: work of no stage, and of other inputs.

    Changed settings are for the stage's verb to judge. So whether inputs have changed is told from the hash that the
    stage would have with the settings that it was run with.
    """
    if not (out / "config.yaml").exists():
        return
    listed, refused, changes = RunFolder.read(out).config.get("stages", {}), dict[str, str](), list[str]()
    for folder in listed.keys() - {stage.folder.name for stage in stages}:
        if (out / folder).is_dir() and holds_work(out / folder):
            refused[folder] = "is no stage of this recipe"
    for stage in stages:
        done = read_json(stage.done) if stage.done.exists() else {}
        before = done.get("settings", stage.values)
        changes += config_.diff({stage.folder.name: before}, {stage.folder.name: stage.values})
        if done and not _is_done(stage, hashes) and done["sha256"] != _hash(stage, before, hashes):
            refused[stage.folder.name] = "read files, or stages, that have changed"
    if refused:
        reasons = [*(f"{name} {why}" for name, why in sorted(refused.items())), *changes]
        raise ConfigError(
            f"{out}: {'; '.join(reasons)}",
            hint=f"restore that, choose another --out, or move away {', '.join(str(out / n) for n in sorted(refused))}",
        )


def _is_done(stage: Stage, hashes: Mapping[str, str]) -> bool:
    return stage.done.exists() and read_json(stage.done)["sha256"] == hashes[stage.name]


def _run_stages(
    stages: Sequence[Stage], hashes: dict[str, str], console: Console, without: Container[str], *, mark: bool
) -> None:
    """Run what is not done, and `mark` what was, with its hash."""
    for stage in stages:
        if _is_done(stage, hashes):
            console.status(f"== {stage.folder.name}: done before, skipped")
            for table in RunFolder.read(stage.folder).summary.get("tables", []):
                console.table(**table)
            continue
        if stage.name in without:
            console.status(f"== {stage.folder.name}: left out")
            continue
        console.status(f"\n== {stage.folder.name}")
        if stage.say:
            console.status(paragraph(stage.say))
        hashes[stage.name] = _hash(stage, stage.values, hashes)  # earlier stages may have written what it reads
        began = _clocks()
        result = _run_stage(stage, console, writes=mark)
        seconds, processor = (now - before for now, before in zip(_clocks(), began, strict=True))
        took = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}
        if mark:
            made = {"sha256": hashes[stage.name], "verb": stage.verb, "settings": stage.values}
            write_json(stage.done, {**made, **took, "result": result})


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Text in lines as wide as the terminal, at most 100 characters, and what the first and other lines begin with."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    fill = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return fill.fill(text)


def _clocks() -> tuple[float, float]:
    """Seconds, and those that processors worked for this process and its children."""
    return time.monotonic(), sum(os.times()[:4])


def _inputs(values: Any) -> dict[str, Any]:
    """What identifies every file (its SHA-256) and folder (names, sizes and times) that a stage's settings name."""
    if isinstance(values, Mapping | list):
        parts = values.values() if isinstance(values, Mapping) else values
        return {path: identity for part in parts for path, identity in _inputs(part).items()}
    if not isinstance(values, str) or not values:
        return {}
    path = Path(values).expanduser()
    if path.is_dir():
        files = {str(file.relative_to(path)): file.stat() for file in sorted(path.rglob("*")) if file.is_file()}
        return {values: [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files.items()]}
    return {values: sha256_file(path)} if path.is_file() else {}


def _run_stage(stage: Stage, console: Console, *, writes: bool) -> dict[str, Any]:
    """Run one stage; returns its result. A verb without a run folder gets one, and runs on the rank that `writes`."""
    verb = VERBS[stage.verb]
    if verb.extra:
        require("torch", verb.extra)
        require("transformers", verb.extra)
    run, of_stage = importlib.import_module(verb.module).run, StageConsole(console)
    if verb.stage:
        run(stage.config, of_stage)
    elif writes:
        with contextlib.closing(RunFolder.open(stage.folder, {stage.verb: stage.values})) as folder:
            run(stage.config, of_stage)
            folder.write_summary({"verb": stage.verb, **of_stage.summary()})
    return of_stage.values


class StageConsole(Console):
    """A stage writes through the recipe's console, but keeps its result for the recipe's own, and its tables."""

    def __init__(self, parent: Console) -> None:
        super().__init__(as_json=parent.as_json, out=parent.out, err=parent.err)
        self.values: dict[str, Any] = {}
        self.tables: list[dict[str, Any]] = []

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Print a table, and keep it."""
        self.tables.append(
            {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}
        )
        super().table(title, columns, rows, note)

    def result(self, values: dict[str, Any]) -> None:
        """Keep the result instead of printing it."""
        self.values = values

    def summary(self) -> dict[str, Any]:
        """What a run folder keeps of a verb without a summary: short values, its tables, lists of rows as tables."""
        short = {
            key.replace("_", " "): value
            for key, value in self.values.items()
            if isinstance(value, str | int | float) and len(str(value)) <= SHOWN
        }
        lists = {k: v for k, v in self.values.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)}
        made = [
            {
                "title": title,
                "columns": list(rows[0]),
                "rows": [["—" if v is None else v for v in r.values()] for r in rows],
            }
            for title, rows in lists.items()
        ]
        return {"headline": short, "tables": [*self.tables, *made]}


def _summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The first headline figure of each stage whose verb chose it, and all tables."""
    headline = {
        f"{name}: {key}": value
        for name, summary in results.items()
        if VERBS[summary["verb"]].stage
        for key, value in list(summary.get("headline", {}).items())[:1]
    }
    return {"verb": "run", "headline": headline, "tables": [t for s in results.values() for t in s.get("tables", [])]}


def read_recipe(recipe: Path, out: Path, changes: Sequence[str] = ()) -> list[Stage]:
    """The stages of a recipe file with `changes` applied, every setting checked. Raises ConfigError."""
    listed = config_.read_yaml(recipe)
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) and len(item) == 1 for item in listed):
        raise ConfigError(f"{recipe}: expected a list of stages", hint="write each stage as `- verb: {setting: value}`")
    stages: dict[str, tuple[str, dict[str, Any]]] = {}
    for item in listed:
        ((key, values),) = item.items()
        verb, _, name = str(key).partition(" ")
        name = name or verb
        if problem := _problem(verb, name, values, stages):
            raise ConfigError(
                f"{recipe}: stage {key!r}: {problem}",
                hint=f"a stage is `verb` or `verb name`, then its settings; verbs are {', '.join(STAGE_VERBS)}",
            )
        stages[name] = (verb, dict(values or {}))
    _apply(stages, changes)
    folders = {name: out / f"{number:02d}-{name}" for number, name in enumerate(stages, 1)}
    return [_stage(name, verb, values, folders) for name, (verb, values) in stages.items()]


def _problem(verb: str, name: str, values: Any, stages: Mapping[str, Any]) -> str:
    """What is wrong with a stage's key and kind of value, '' if nothing."""
    if verb not in STAGE_VERBS:
        return "this verb makes no stage" if verb in VERBS else f"no such verb{did_you_mean(verb, STAGE_VERBS)}"
    if not STAGE_NAME.fullmatch(name):
        return f"the name {name!r} is not made of letters, digits, - and _"
    if name == PYTHON:
        return f"@{PYTHON}/ is the standard library, so no stage is called that"
    if name in stages:
        return "a stage of that name exists already"
    if not isinstance(values, Mapping | None):
        return f"got {type(values).__name__} {values!r}, expected a mapping of settings"
    if not isinstance((values or {}).get("say", ""), str):
        return "`say` is text: what is told before the stage runs"
    if "out" in (values or {}) and VERBS[verb].stage:
        return "`out` is set by the recipe: leave it out, and give --out for the whole run"
    return ""


def _apply(stages: Mapping[str, tuple[str, dict[str, Any]]], changes: Sequence[str]) -> None:
    for change in changes:
        name, dot, rest = change.partition(".")
        if not dot or name not in stages:
            raise ConfigError(
                f"--set {change}: {name!r} is no stage of this recipe{did_you_mean(name, stages)}",
                hint=f"write stage.setting=value; the stages are {', '.join(stages)}",
            )
        config_.override(stages[name][1], rest)


def _stage(name: str, verb: str, listed: dict[str, Any], folders: Mapping[str, Path]) -> Stage:
    needs: list[str] = []
    values = {key: value for key, value in listed.items() if key != "say"}
    resolved = {key: _resolve(value, name, folders, needs) for key, value in values.items()}
    if VERBS[verb].stage:
        resolved["out"] = str(folders[name])
    return Stage(
        name=name,
        verb=verb,
        folder=folders[name],
        values=values,
        config=config_.build(load_config(verb), resolved, where=f"{name}."),
        needs=tuple(dict.fromkeys(needs)),
        say=str(listed.get("say", "")).strip(),
    )


def _resolve(value: Any, stage: str, folders: Mapping[str, Path], needs: list[str]) -> Any:
    """Replace '@name/rest' by a path inside the folder of the earlier stage `name`, noting the name in `needs`.

    '@/rest' is in the stage's own folder, and '@python/rest' in this Python's standard library.
    What a task is may stand before it: 'needle:@name/rest'.
    """
    if isinstance(value, list):
        return [_resolve(item, stage, folders, needs) for item in value]
    found = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    prefix, (name, _, rest) = found[1] or "", found[2].partition("/")
    earlier = list(folders)[: list(folders).index(stage)]
    known = {"": folders[stage], PYTHON: Path(sysconfig.get_path("stdlib"))}
    if name in known:
        return prefix + str(known[name] / rest)
    if name not in earlier:
        raise ConfigError(
            f"{stage}: {value!r} points to {name!r}, which is no earlier stage{did_you_mean(name, earlier)}",
            hint=f"earlier stages: {', '.join(earlier) or 'none'}",
        )
    needs.append(name)
    return prefix + str(folders[name] / rest)
