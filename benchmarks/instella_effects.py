"""The effects of Instella's recipe on a small model: each beside a fair control, over seeds.

  stage2   a run of stage 2 against the model of stage 1 that it started from
  soup     the mean of the runs against their mean, the best of them, and one run with as many tokens as all of them
  format   fine-tuning against its start, which is asked in the chat format and as text: what of the gain is format?
  dpo      preferences against their start; means of log-probabilities (the paper's) against sums, equally strong
  grpo     reinforcement against its start, and against fine-tuning for about as long
  theta    a longer context by the law of the RoPE base, with the base kept, and untrained, at each length of the tests

The stages are those of recipes/instella-tiny.yaml with other seeds, and controls that differ from one of them in what
is named here. Seed 0 is the recipe itself; seed n moves every seed in it by 1000 n: data, initial weights, orders,
samples.

    python benchmarks/instella_effects.py [--seeds 0 1 2] [--out runs/instella_effects] [--only soup grpo] [--record]

Stages that have ended are kept in --out: the same command goes on where it stopped. When all are done, one row is
appended to results/; --record appends one with what is done so far. Differences are those of the same questions.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from instella_effects_scores import (
    Score,
    Scores,
    complete,
    correct,
    document_nats,
    needle_nats,
    preferred,
    ratio,
    reply_tokens,
    solved,
    stage_folder,
    worked,
)
from record import record
from transformers.utils import logging as transformers_logging

from luthier.cli.main import load_config
from luthier.cli.run import find_recipe, read_recipe, run_recipe
from luthier.core.config import dump_yaml, override, read_yaml
from luthier.core.console import Console
from luthier.core.errors import Interrupted
from luthier.core.files import atomic_write, read_json
from luthier.core.run import RunFolder
from luthier.core.stats import bootstrap_ratio, student_mean

RECIPE = Path("recipes/instella-tiny.yaml")
SEED_STEP = 1000
SUM_BETA = 0.5  # as strong on a pair of replies of ten tokens, which is their mean here, as beta 5 on means of tokens
SFT_PER_UPDATE = 13  # updates of fine-tuning that take about as long as one of reinforcement here
QUESTIONS, PAIRS = "test-questions", "test-pairs"
NOTE = (
    "Values: means over seeds. Difference: the value minus its value beside it, on the same n questions, documents or "
    "pairs of all seeds, with a 95 % bootstrap over them. Over seeds: the mean of the seeds' differences, Student's "
    "95 % interval. The best run is the best by the figure itself, which favours it. Nats: less is better."
)

Values = dict[str, Any]
Stages = dict[str, tuple[str, Values]]  # by name: verb and settings


# The stages of one seed.


def listed(changes: Sequence[str]) -> Stages:
    """The recipe's stages with `changes` (stage.setting=value), and the controls that are made from them."""
    stages: Stages = {}
    for item in read_yaml(find_recipe(RECIPE)):
        ((key, values),) = item.items()
        verb, _, name = key.partition(" ")
        stages[name or verb] = (verb, copy.deepcopy(dict(values or {})))
    for change in changes:
        name, _, assignment = change.partition(".")
        if name not in stages:
            raise SystemExit(f"--set {change}: the recipe's stages are {', '.join(stages)}")
        override(stages[name][1], assignment)
    return stages | controls(stages)


def members(stages: Stages) -> list[str]:
    """The runs that make the soup."""
    return [model.removeprefix("@") for model in stages["soup"][1]["models"]]


def controls(stages: Stages) -> Stages:
    """Stages that differ from one of the recipe's in a setting or in their start."""

    def like(name: str, **changed: Any) -> tuple[str, Values]:
        verb, values = stages[name]
        return verb, {key: value for key, value in (values | changed).items() if value is not None}

    runs = members(stages)
    steps = {name: stages[name][1]["steps"] for name in (runs[0], "mathrl", "extend")}
    made = {"stage2-long": like(runs[0], steps=len(runs) * steps[runs[0]])}
    made |= {f"base-{run}": like("base-soup", model=f"@{run}/model") for run in (*runs, "stage2-long")}
    made |= {
        "chat-soup": like("chat-sft", model="@soup/model"),
        "dpo-sum": like("dpo", loss="sum", beta=SUM_BETA),
        "chat-dpo-sum": like("chat-dpo", model="@dpo-sum/model"),
        "sft-more": like("sft", model="@dpo/model", steps=SFT_PER_UPDATE * steps["mathrl"]),
        "chat-sft-more": like("chat-rl", model="@sft-more/model"),
        "sampled-sft-more": like("sampled-rl", model="@sft-more/model"),
        "extend-keep": like("extend", theta="keep"),
        "extend-third": like("extend", steps=steps["extend"] // 3),
        "extend-keep-third": like("extend", theta="keep", steps=steps["extend"] // 3),
        "needles-start": like("needles-long", model="@short/model"),
    }
    for name in ("keep", "third", "keep-third"):
        made[f"needles-{name}"] = like("needles-long", model=f"@extend-{name}/model")
    return made


def reseeded(stages: Stages, seed: int) -> Stages:
    """Every seed of training and data moved; evaluations keep theirs."""
    moved = copy.deepcopy(stages)
    for verb, values in moved.values():
        defaults = {field.name: field.default for field in dataclasses.fields(load_config(verb))}
        if verb != "eval" and "seed" in defaults:
            values["seed"] = values.get("seed", defaults["seed"]) + SEED_STEP * seed
    return moved


def needed(recipe: Path, folder: Path, wanted: set[str]) -> set[str]:
    """The stages, and all that they need."""
    stages = {stage.name: stage for stage in read_recipe(recipe, folder)}
    found, waiting = set[str](), list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += stages[name].needs
    return found


def recipe_of(stages: Stages, seed: int) -> str:
    """The recipe of one seed, as YAML."""
    text = [{f"{verb} {name}": values} for name, (verb, values) in reseeded(stages, seed).items()]
    return f"# Made by benchmarks/instella_effects.py.\n{dump_yaml(text)}"


def check_recipe(stages: Stages, seed: int, out: Path) -> None:
    """Refuse to mix settings: what a seed has was made by this recipe and --set."""
    recipe = out / f"seed-{seed}.yaml"
    if recipe.exists() and recipe.read_text(encoding="utf-8") != recipe_of(stages, seed):
        raise SystemExit(f"{recipe} is another recipe: give the --set and the commit that it was made with, or --out")


def run_seed(stages: Stages, seed: int, out: Path, wanted: set[str]) -> None:
    """Run what is missing of the stages that are wanted."""
    out.mkdir(parents=True, exist_ok=True)
    recipe, folder = out / f"seed-{seed}.yaml", out / f"seed-{seed}"
    atomic_write(recipe, recipe_of(stages, seed))
    kept = needed(recipe, folder, wanted)
    run_recipe(recipe, folder, (), Console(), without={name for name in stages if name not in kept})


# The effects.


@dataclass(frozen=True)
class Line:
    """A figure of some stages (their mean) beside that of others: their mean, or the best of them by this figure."""

    figure: str
    score: Score
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    beside: str
    best: bool = False
    lower: bool = False
    """Whether less is better."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Whose figures it needs."""
        return (*self.ours, *self.theirs)


def effects(stages: Stages) -> dict[str, list[Line]]:
    """The lines of the table, by effect."""
    runs = members(stages)
    lengths = stages["longer"][1]["test_lengths"]
    return {
        "stage2": list(_stage2(runs)),
        "soup": list(_soup(runs)),
        "format": [
            Line("replies in the format", complete(QUESTIONS), ("chat-sft",), ("chat-soup",), "its start"),
            Line("unseen questions", correct(QUESTIONS), ("chat-sft",), ("chat-soup",), "its start"),
            Line("unseen questions", correct(QUESTIONS), ("base-soup",), ("chat-soup",), "start as text − as chat"),
            Line("unseen pairs", correct(PAIRS), ("chat-sft",), ("chat-soup",), "its start"),
        ],
        "dpo": list(_dpo()),
        "grpo": list(_grpo()),
        "theta": list(_theta(lengths)),
    }


def _stage2(runs: Sequence[str]) -> Iterator[Line]:
    after, before = tuple(f"base-{run}" for run in runs), ("base-stage1",)
    yield Line("unseen questions", correct(QUESTIONS), after, before, "stage 1")
    yield Line("unseen pairs", correct(PAIRS), after, before, "stage 1")
    for what in ("problems", "stories"):
        score = partial(document_nats, f"{what}-held-out.jsonl")
        yield Line(f"nats/token, {what}", score, tuple(runs), ("stage1",), "stage 1", lower=True)


def _soup(runs: Sequence[str]) -> Iterator[Line]:
    evaluated = tuple(f"base-{run}" for run in runs)
    nats = partial(document_nats, "stage2-held-out.jsonl")
    for beside, one, asked, best in (
        ("mean run", tuple(runs), evaluated, False),
        ("best run", tuple(runs), evaluated, True),
        (f"one run of {len(runs)} × tokens", ("stage2-long",), ("base-stage2-long",), False),
    ):
        yield Line("nats/token, stage 2's mix", nats, ("soup",), one, beside, best, lower=True)
        yield Line("unseen questions", correct(QUESTIONS), ("base-soup",), asked, beside, best)
        yield Line("unseen pairs", correct(PAIRS), ("base-soup",), asked, beside, best)


def _dpo() -> Iterator[Line]:
    for beside, other in (("its start", "chat-sft"), ("sums of log-probabilities", "chat-dpo-sum")):
        yield Line("unseen questions", correct(QUESTIONS), ("chat-dpo",), (other,), beside)
        yield Line("unseen pairs", correct(PAIRS), ("chat-dpo",), (other,), beside)
        yield Line("replies with steps", worked(QUESTIONS), ("chat-dpo",), (other,), beside)
        yield Line("tokens of a reply", reply_tokens(QUESTIONS), ("chat-dpo",), (other,), beside)
    for contrast in ("style", "mistake"):
        for loss in ("norm", "sum"):  # how both models see the pairs: by the mean of tokens, and by the sum
            score, by = partial(preferred, contrast, "sft", loss), "mean" if loss == "norm" else "sum"
            yield Line(f"pairs of {contrast} moved rightly, by {by}", score, ("dpo",), ("dpo-sum",), "sums")


def _grpo() -> Iterator[Line]:
    for beside, sampled, greedy in (
        ("its start", "sampled-dpo", "chat-dpo"),
        ("fine-tuning as long", "sampled-sft-more", "chat-sft-more"),
    ):
        yield Line("pass@1, unseen questions", correct(QUESTIONS), ("sampled-rl",), (sampled,), beside)
        yield Line("pass@k of all samples", solved(QUESTIONS), ("sampled-rl",), (sampled,), beside)
        yield Line("greedy, unseen questions", correct(QUESTIONS), ("chat-rl",), (greedy,), beside)
        yield Line("greedy, unseen pairs", correct(PAIRS), ("chat-rl",), (greedy,), beside)


def _theta(lengths: Sequence[int]) -> Iterator[Line]:
    asked = (
        ("base kept", "needles-long", "needles-keep"),
        ("base kept, a third of the steps", "needles-third", "needles-keep-third"),
        ("untrained", "needles-long", "needles-start"),
    )
    for beside, ours, theirs in asked:
        for length in lengths:
            found = correct("needle:test", f"length {length}")
            yield Line(f"found at {length} tokens", found, (ours,), (theirs,), beside)
            if theirs != "needles-start":
                nats = partial(needle_nats, length)
                yield Line(f"nats/token at {length}", nats, (ours,), (theirs,), beside, lower=True)


# The table.


@dataclass(frozen=True)
class Measured:
    """One line of one seed: both figures, and per item the weighted difference and its weight."""

    ours: float
    theirs: float
    tops: list[float]
    bottoms: list[float]

    @property
    def difference(self) -> float:
        """Ours minus theirs, on the items of both."""
        return sum(self.tops) / sum(self.bottoms)


def measure(line: Line, run: Path) -> Measured:
    """A line of one seed, on the items that all of its stages have."""
    found = {stage: line.score(run, stage) for stage in line.stages}
    items = [item for item in found[line.stages[0]] if all(item in scores for scores in found.values())]
    if not items:
        raise SystemExit(f"{run}, {line.figure}: {line.stages} have no item in common")
    same = {stage: {item: scores[item] for item in items} for stage, scores in found.items()}
    ours, theirs = (mean([same[stage] for stage in side]) for side in (line.ours, line.theirs))
    if line.best:
        theirs = (min if line.lower else max)((same[stage] for stage in line.theirs), key=ratio)
    tops = [ours[item][0] - theirs[item][0] for item in items]
    return Measured(ratio(ours), ratio(theirs), tops, [ours[item][1] for item in items])


def mean(some: Sequence[Scores]) -> Scores:
    """The mean of several stages, item by item."""
    return {item: (fmean(s[item][0] for s in some), some[0][item][1]) for item in some[0]}


def tabulated(effect: str, line: Line, runs: Mapping[int, Path]) -> Values:
    """One row of the table, over the seeds."""
    found = {seed: measure(line, run) for seed, run in runs.items()}
    each = [one.difference for one in found.values()]
    tops, bottoms = ([x for one in found.values() for x in getattr(one, name)] for name in ("tops", "bottoms"))
    seeds = student_mean(each) if len(each) > 1 else None
    return {
        "effect": effect,
        "figure": line.figure,
        "value": round(fmean(one.ours for one in found.values()), 4),
        "beside": line.beside,
        "its value": round(fmean(one.theirs for one in found.values()), 4),
        "difference": bootstrap_ratio(tops, bottoms).text(4),
        "over seeds": "—" if seeds is None else seeds.text(4),
        "each seed": " ".join(f"{value:+.4f}" for value in each),
        "n": len(tops),
        "seeds": list(runs),
    }


def format_share(runs: Mapping[int, Path]) -> Values:
    """What of the gain of fine-tuning its start has already when it is asked in its own format; of seeds that gain."""
    shares = []
    for run in runs.values():
        tuned, chat, text = (ratio(correct(QUESTIONS)(run, stage)) for stage in ("chat-sft", "chat-soup", "base-soup"))
        shares += [(text - chat) / (tuned - chat)] if tuned > chat else []
    seeds = student_mean(shares) if len(shares) > 1 else None
    return {
        "effect": "format",
        "figure": "share of the gain that is format",
        "value": round(fmean(shares), 4) if shares else "—",
        "beside": "—",
        "its value": "—",
        "difference": "—",
        "over seeds": "—" if seeds is None else seeds.text(4),
        "each seed": " ".join(f"{share:.4f}" for share in shares),
        "n": "—",
        "seeds": list(runs),
    }


def informative(runs: Mapping[int, Path]) -> list[list[float]]:
    """Of each seed, the share of informative groups in the first and the last rollout that is logged."""
    rows = [RunFolder.read(stage_folder(run, "mathrl")).metrics("train") for run in runs.values()]
    known = [[row["informative_groups"] for row in some if "informative_groups" in row] for some in rows]
    return [[round(some[0], 3), round(some[-1], 3)] for some in known]


def ended(run: Path) -> dict[str, float]:
    """Processor seconds of the stages of a seed that have ended."""
    files = sorted(run.glob("*/stage.json"))
    return {file.parent.name.partition("-")[2]: read_json(file)["processor_seconds"] for file in files}


def seconds(runs: Sequence[Path]) -> dict[str, float]:
    """Mean processor seconds of each stage."""
    each = [ended(run) for run in runs]
    names = dict.fromkeys(name for some in each for name in some)
    return {name: round(fmean(some[name] for some in each if name in some), 1) for name in names}


def summarize(lines: Mapping[str, Sequence[Line]], seeds: Sequence[int], out: Path) -> Values:
    """The table of the effects that at least one seed has."""
    rows, reinforced = list[Values](), {}
    for effect, some in lines.items():
        wanted = {stage for line in some for stage in line.stages}
        runs = {seed: out / f"seed-{seed}" for seed in seeds if wanted <= ended(out / f"seed-{seed}").keys()}
        rows += [tabulated(effect, line, runs) for line in some] if runs else []
        rows += [format_share(runs)] if runs and effect == "format" else []
        if runs and effect == "grpo":
            reinforced = {"informative groups, first and last": informative(runs)}
    return {"rows": rows, **reinforced, "processor seconds": seconds([out / f"seed-{s}" for s in seeds])}


def main() -> None:
    """Run the seeds and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/instella_effects"))
    parser.add_argument("--only", nargs="+", metavar="EFFECT", help="run and show these effects alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.SETTING=VALUE", help="change the recipe")
    parser.add_argument("--record", action="store_true", help="append a row with what is done, and stop")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    stages = listed(options.set)
    lines = effects(stages)
    if unknown := [name for name in options.only or () if name not in lines]:
        parser.error(f"--only {unknown[0]}: the effects are {', '.join(lines)}")
    lines = {name: some for name, some in lines.items() if not options.only or name in options.only}
    wanted = {stage for some in lines.values() for line in some for stage in line.stages}
    for seed in options.seeds:
        check_recipe(stages, seed, options.out)
    try:
        for seed in () if options.record else options.seeds:
            run_seed(stages, seed, options.out, wanted)
    except Interrupted as error:
        raise SystemExit(f"{error}; {error.hint}") from error
    summary = summarize(lines, options.seeds, options.out)
    if not summary["rows"]:
        raise SystemExit("no effect is finished: run without --record first")
    record("instella_effects", changed=options.set, **summary)
    rows = summary["rows"]
    Console().table("Effects", list(rows[0]), [list(row.values()) for row in rows], NOTE)


if __name__ == "__main__":
    main()
