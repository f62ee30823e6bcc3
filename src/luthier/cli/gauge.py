"""`luthier gauge`: how far students are from the bracket teacher, exactly, or which replies a judge prefers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from luthier.cli.collect import BRACKETS, open_brackets
from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError, require
from luthier.core.files import read_json
from luthier.core.run import RunFolder
from luthier.core.stats import bootstrap_mean, paired_difference
from luthier.data.formats import read_rows
from luthier.data.row_source import turns
from luthier.distill.bracket_teacher import BracketTeacher

if TYPE_CHECKING:
    from luthier.core.stats import Interval
    from luthier.distill.exact import Gauged

PRIMARY = "valid at teacher's lengths"


@dataclass(frozen=True, kw_only=True)
class GaugeConfig:
    """Compare students with the first of them: by the known probabilities of the bracket teacher, or by a judge.

    With --judge the positional arguments are sets of replies to the same prompts, from `luthier collect`.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Model folders or hub ids; for a judge folders of `luthier collect`, or files with prompt and completion."""
    teacher: Path | None = None
    """Folder of `luthier collect` with the teacher brackets."""
    judge: str | None = None
    """In its place: a model that is shown two replies to a prompt, in both orders, and names the better one; its name
    on the server, or a model folder."""
    endpoint: str | None = None
    """URL of the judge's OpenAI-compatible server (OPENAI_API_KEY is used if set); by default it runs in this
    process."""
    budget: tuple[str, ...] = ()
    """Limits of the judge over all runs in this folder, kept before each request: calls=1000, tokens=200000
    (generated), dollars=5."""
    prices: Path | None = None
    """YAML file with dollars per million tokens, by model: NAME: {input: 0.05, output: 0.2}."""
    at_once: int = 16
    """The judge's requests in flight."""
    max_tokens: int = 1024
    """Longest verdict of the judge in tokens."""
    split: Literal["test", "validation"] = "test"
    """Whose prompts are asked; choose on validation, report on test."""
    temperatures: tuple[float, ...] = (1.0,)
    """Each model is sampled at each; a lower one costs no training, so compare with it."""
    samples: int = 8
    """Replies to each prompt; for a judge at most so many of those that are there."""
    raw: bool = False
    """Prompts are texts to continue, without chat format."""
    seed: int = 0
    """Decides the samples."""
    device: str = "auto"
    """cpu, cuda or auto."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/gauge")
    """Run folder for the summary."""

    def __post_init__(self) -> None:
        if not self.models or not self.temperatures or self.samples < 1:
            raise ConfigError(
                "gauge needs a model, a temperature and a sample at least",
                hint="luthier gauge runs/sft/model --teacher …",
            )
        self._check_judge()
        if min(self.temperatures) <= 0:
            raise ConfigError(
                f"temperatures: got {min(self.temperatures)}, expected more than 0", hint="0.3 is a low one"
            )

    def _check_judge(self) -> None:
        if (self.teacher is None) == (self.judge is None):
            raise ConfigError(
                "gauge needs either teacher, one that is known exactly, or judge, and not both",
                hint="luthier gauge MODEL … --teacher runs/brackets, or luthier gauge REPLIES REPLIES --judge NAME",
            )
        if self.judge is None:
            idle = [name for name in ("endpoint", "budget", "prices") if getattr(self, name)]
        else:
            idle = [name for name, plain in (("raw", False), ("temperatures", (1.0,))) if getattr(self, name) != plain]
        if idle:
            words = "without a judge" if self.judge is None else "of replies that are there already"
            raise ConfigError(f"{', '.join(idle)}: there is none {words}", hint="leave it out")
        if self.judge is not None and len(self.models) < 2:
            raise ConfigError(
                "judge: got one set of replies, expected two or more", hint="luthier collect … makes them of any model"
            )
        if self.at_once < 1 or self.max_tokens < 1:
            raise ConfigError("at_once and max_tokens must be at least 1", hint="leave them out")


def dry_run(config: GaugeConfig, console: Console) -> None:
    """Print how many replies are sampled, or how many calls of the judge there are and the most that they can cost."""
    if config.judge is not None:
        from luthier.cli.gauge_judge import planned

        rows = planned(config)
    else:
        _teacher(config)
        replies = len(config.models) * len(config.temperatures) * len(_prompts(config)) * config.samples
        rows = [["students", f"{len(config.models)}"], ["replies sampled", f"{replies:,}"]]
    console.table(f"gauge {' '.join(config.models)}", ["quantity", "value"], rows)
    console.result(dict(rows))


def run(config: GaugeConfig, console: Console) -> None:
    """Sample and measure, or ask the judge, and print the tables."""
    from luthier.report.html import write_report

    if config.judge is not None:
        from luthier.cli.gauge_judge import run as judge

        judge(config, console)
        return
    for package in ("torch", "transformers"):
        require(package, "torch")
    teacher = _teacher(config)
    prompts = _prompts(config)
    may_change = ("out", "device")
    with contextlib.closing(RunFolder.open(config.out, to_mapping(config), may_change=may_change)) as folder:
        arms: dict[str, Gauged] = {}
        with console.progress(len(config.models) * len(config.temperatures), "students") as advance:
            for number, name in enumerate(config.models):
                arms |= _arms(config, number, name, teacher, prompts)
                advance(len(config.temperatures))
        tables = [_figures(arms, len(prompts), config), *_differences(arms)]
        for table in tables:
            console.table(**table)
        best = {name: _text(arm.matched().value) for name, arm in arms.items()}
        folder.write_summary(
            {"verb": "gauge", "headline": {f"{PRIMARY}: {k}": v for k, v in best.items()}, "tables": tables}
        )
        report = write_report(folder.path)
        console.print(f"report: {report}")
        console.result({"students": {name: _values(arm) for name, arm in arms.items()}, "report": str(report)})


def _teacher(config: GaugeConfig) -> BracketTeacher:
    assert config.teacher is not None
    record = config.teacher / "teacher.json"
    name = str(read_json(record)["model"]) if record.is_file() else ""
    if name.partition(":")[0] != BRACKETS:
        got = f"its teacher is {name}" if name else "no teacher.json"
        raise DataError(
            f"{config.teacher}: {got}, expected replies of the teacher brackets",
            hint="luthier collect brackets:400 --model brackets -o runs/brackets; of other teachers nothing is known "
            "exactly",
        )
    return open_brackets(name)


def _prompts(config: GaugeConfig) -> list[str]:
    """The different prompts of the split, in order."""
    assert config.teacher is not None
    file = config.teacher / f"{config.split}.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: missing", hint=f"collect with --{config.split} above 0, or more prompts")
    asked = (turns("user", row["prompt"])[-1]["content"] for row in read_rows(file, "completion"))
    return list(dict.fromkeys(asked))


def _arms(
    config: GaugeConfig, number: int, name: str, teacher: BracketTeacher, prompts: list[str]
) -> dict[str, Gauged]:
    """A model at each temperature."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.distill.exact import gauge
    from luthier.distill.lessons import prompt_encoder
    from luthier.learn.parallel import choose_device
    from luthier.models.load import load_pretrained

    model, tokenizer = load_pretrained(name, device=choose_device(config.device)), load_tokenizer(name)
    encode, label = prompt_encoder(tokenizer, raw=config.raw), _label(config, number, name)
    return {
        f"{label} T={temperature:g}": gauge(
            model,
            tokenizer,
            teacher,
            prompts,
            encode,
            samples=config.samples,
            temperature=temperature,
            seed=config.seed,
        )
        for temperature in config.temperatures
    }


def _label(config: GaugeConfig, number: int, name: str) -> str:
    """What tells a model folder from the others: its name, or its run's."""
    short, all_ = _tail(name), [_tail(other) for other in config.models]
    return short if all_.count(short) == 1 else f"{number + 1}-{short}"


def _tail(name: str) -> str:
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _values(arm: Gauged) -> dict[str, float | None]:
    shown = {"valid": arm.validity, "forward_kl": arm.forward, "reverse_kl": arm.reverse, "length": arm.length}
    means = {name: sum(values) / len(values) for name, values in shown.items()}
    matched = arm.matched()
    return {**means, "matched": matched.value, "covered": matched.covered, "unique_share": arm.unique_share}


def _figures(arms: Mapping[str, Gauged], prompts: int, config: GaugeConfig) -> dict[str, Any]:
    rows = []
    for name, arm in arms.items():
        matched = arm.matched()
        kl = [bootstrap_mean(values).text(2) for values in (arm.forward, arm.reverse)]
        length = f"{sum(arm.length) / len(arm.length):.1f}"
        at_lengths = f"{_text(matched.value)} ({matched.covered:.0%} covered)"
        rows.append([name, at_lengths, bootstrap_mean(arm.validity).text(), *kl, length, f"{arm.unique_share:.3f}"])
    theirs = [length for lengths in next(iter(arms.values())).teacher_lengths for length in lengths]
    rows.append(["teacher", "1.000", "1.000", "0.00", "", f"{sum(theirs) / len(theirs):.1f}", ""])
    columns = ["student", PRIMARY, "valid", "forward KL", "reverse KL", "length", "unique"]
    note = (
        f"{prompts} {config.split} prompts, {config.samples} replies each; KL in nats per reply, 95 % intervals over "
        "prompts. Short replies have a high plain validity and a low reverse KL: neither counts alone."
    )
    return {"title": "Distance from the teacher", "columns": columns, "rows": rows, "note": note}


def _differences(arms: Mapping[str, Gauged]) -> list[dict[str, Any]]:
    """Every student minus the first, paired over prompts; no table for a single one."""
    from luthier.distill.exact import matched_difference

    (first, base), *others = arms.items()
    rows = [
        [
            name,
            _interval(matched_difference(arm, base)),
            paired_difference(arm.validity, base.validity).text(),
            paired_difference(arm.forward, base.forward).text(2),
            paired_difference(arm.reverse, base.reverse).text(2),
            paired_difference(arm.length, base.length).text(1),
        ]
        for name, arm in others
    ]
    columns = ["student", PRIMARY, "valid", "forward KL", "reverse KL", "length"]
    note = "Differences, paired over prompts, 95 % intervals. One seed of training: another may give other signs."
    return [{"title": f"Minus {first}", "columns": columns, "rows": rows, "note": note}] if rows else []


def _text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _interval(found: Interval | None) -> str:
    return "unknown" if found is None else found.text()
