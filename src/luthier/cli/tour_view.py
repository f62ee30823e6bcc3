"""What the tour says at its end: of each system a number beside its honest comparison, read from what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier.cli.run import paragraph

CHANCE = 0.05  # differences with a larger p, or an interval around zero, are told as possible chance
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?")
P_VALUE = "p (exact McNemar)"


class Done(NamedTuple):
    """A finished stage: its folder, what it gave back, and the summary that its report shows."""

    folder: Path
    result: Mapping[str, Any]
    summary: Mapping[str, Any]


Stages = Mapping[str, Done]


class System(NamedTuple):
    """One of the five: what `tell` says of the stages it `needs`, files of stages to look at, and what to try next."""

    name: str
    paper: str
    needs: tuple[str, ...]
    tell: Callable[[Stages], Iterator[str]]
    next: str
    pages: tuple[tuple[str, str], ...] = ()


def lines(stages: Stages, out: Path) -> Iterator[str]:
    """The end of the tour, as wide as the terminal where paths and commands allow."""
    for system in SYSTEMS:
        yield f"\n{system.name} · {system.paper}"
        missing = [name for name in system.needs if name not in stages]
        if missing:
            yield paragraph(f"Left out here: {', '.join(missing)}.", "  ", "  ")
            continue
        yield paragraph(" ".join(system.tell(stages)), "  ", "  ")
        sections = ", ".join(stages[name].folder.name for name in system.needs)
        yield paragraph(f"{out / 'report.html'}: {sections}", "  see   ", "        ")
        yield from (f"        {stages[name].folder / file}" for name, file in system.pages)
        yield f"  next  {system.next.format_map({name: done.folder for name, done in stages.items()})}"


# What each system did


def _pretrain(stages: Stages) -> Iterator[str]:
    score = stages["eval"].result
    best, theirs = min(((row[0], float(row[3])) for row in score["table"][1:]), key=lambda pair: pair[1])
    ours = score["bits_per_byte"]
    yield f"On text that it has not seen the model needs {ours:.3f} bits per byte; {best}, given the same training"
    yield f"text, needs {theirs:.3f}{'' if ours < theirs else ', which is less'}."


def _tune(stages: Stages) -> Iterator[str]:
    after = stages["after-rl"]
    (sft, n), (rl, _) = _solved(stages["after-sft"]), _solved(after)
    row, columns = _against(after)
    yield f"Of {n} unseen sums it solves {sft:.2f} after fine-tuning and {rl:.2f} after reinforcement:"
    yield f"{_verdict(float(row[columns.index(P_VALUE)]), better=rl > sft)}."


def _entropy(stages: Stages) -> Iterator[str]:
    found = stages["estimate"].result
    interval = f" [{found['low']:.3f}, {found['high']:.3f}]" if "low" in found else ""
    yield f"Held-out text holds at most {found['bits_per_byte']:.3f} bits per byte{interval}."
    (packed,) = stages["compress"].result["files"]
    rivals = {name: _compressed(packed["file"], name) for name in ("xz", "gzip")}
    yield f"The compressor makes {packed['compressed_bytes']:,} bytes of {packed['bytes']:,};"
    yield " and ".join(f"{name} makes {size:,}" for name, size in rivals.items()) + "."


def _quantize(stages: Stages) -> Iterator[str]:
    ours, rounded = stages["compare"].result, stages["rounded-compare"].result
    moved, theirs = ours["kl"]["value"], rounded["kl"]["value"]
    sizes = [size / 1e6 for size in (ours["bytes"]["A"], ours["bytes"]["B"], rounded["bytes"]["B"])]
    yield f"At 4 bits a weight the predictions move by {moved:.4f} nats per token; by plain rounding, {theirs:.4f}."
    yield f"On disk {sizes[0]:.1f} MB become {sizes[1]:.1f}, rounded {sizes[2]:.1f}: the rotations take room too,"
    yield "more of it the smaller the matrices." if moved < theirs else "and here they gain nothing."


def _reason(stages: Stages) -> Iterator[str]:
    done = stages["reasoning"]
    (methods,) = done.result["tasks"].values()
    (cot, single), (ssr, checked), (vote, voted) = methods.items()
    pairs = next(table for table in done.summary["tables"] if P_VALUE in table["columns"])
    p = {(row[0], row[1]): float(row[-1]) for row in pairs["rows"]}
    right = {name: methods[name]["accuracy"]["value"] for name in methods}
    helps = _verdict(p[cot, ssr], better=right[ssr] > right[cot])
    wins = _verdict(p[ssr, vote], better=right[ssr] > right[vote])
    yield f"Of {single['accuracy']['n']} new problems one chain of thought solves {right[cot]:.2f}, checking every line"
    yield f"{right[ssr]:.2f} at {_times(checked, single)} the tokens: {helps}."
    yield f"A vote ({vote.partition(':')[0]}) at {_times(voted, single)} the tokens solves {right[vote]:.2f};"
    yield f"checking beside it: {wins}."


def _distill(stages: Stages) -> Iterator[str]:
    done = stages["gauge"]
    imitated, played = done.result["students"].values()
    difference = _table(done, "Minus")["rows"][0][1]
    yield f"Valid at the teacher's lengths: {_share(played)} of the adversarial student's replies, {_share(imitated)}"
    yield f"of the imitator's. The difference, {difference}, is {_sign(difference)}."
    if "shut" in _table(stages["distill"], "Gate")["title"]:
        yield "The gate was shut: the discriminator knew no more than lengths and n-grams tell, and a run that counts"
        yield "would have stopped there."


def _table(done: Done, title: str) -> Mapping[str, Any]:
    """The table of a summary whose title begins so."""
    return next(table for table in done.summary["tables"] if table["title"].startswith(title))


def _solved(done: Done) -> tuple[float, int]:
    """Share of right answers, of how many, of an evaluation with one task and one method."""
    (methods,) = done.result["tasks"].values()
    (numbers,) = methods.values()
    return numbers["accuracy"]["value"], numbers["accuracy"]["n"]


def _against(done: Done) -> tuple[Sequence[str], list[str]]:
    table = next(table for table in done.summary["tables"] if P_VALUE in table["columns"])
    return table["rows"][0], table["columns"]


def _verdict(p: float, *, better: bool) -> str:
    if p > CHANCE:
        return f"no clear difference (p = {p:.2g})"
    return f"{'better' if better else 'worse'} (p = {p:.2g})"


def _sign(interval: str) -> str:
    """What 'value [low, high]' says about zero."""
    numbers = [float(text.replace("−", "-")) for text in NUMBER.findall(interval)]
    if len(numbers) != 3:
        return "not known"
    if numbers[1] > 0:
        return "better"
    return "worse" if numbers[2] < 0 else "no clear one"


def _times(method: Mapping[str, Any], single: Mapping[str, Any]) -> str:
    return f"{method['completion_tokens'] / max(single['completion_tokens'], 1):.1f} times"


def _share(student: Mapping[str, Any]) -> str:
    return "an unknown share" if student["matched"] is None else f"{student['matched']:.2f}"


def _compressed(file: str, name: str) -> int:
    """Bytes that another compressor makes of the same file, measured now."""
    from luthier.data.compressors import compressed_bytes

    return compressed_bytes(name, Path(file).read_bytes())


SYSTEMS = (
    System(
        "train",
        "Instella, arXiv 2511.10628",
        ("pretrain", "eval"),
        _pretrain,
        "luthier chat {pretrain}/model",
    ),
    System(
        "entropy",
        "Know Your Limits, arXiv 2511.10618",
        ("estimate", "tokens", "compress"),
        _entropy,
        "luthier tokens README.md --model {pretrain}/model",
        (("tokens", "page.html"),),
    ),
    System(
        "quantize",
        "ParoQuant, arXiv 2511.10645",
        ("quantize", "compare", "rounded", "rounded-compare"),
        _quantize,
        "luthier inspect {quantize}/model",
    ),
    System(
        "train further",
        "Instella, arXiv 2511.10628",
        ("sft", "after-sft", "mathrl", "after-rl"),
        _tune,
        "luthier chat {mathrl}/model --prompt 'Ann has 3 pears and finds 4 more. How many pears does Ann have?'",
    ),
    System(
        "reason",
        "Socratic Self-Refine, arXiv 2511.10621",
        ("reasoner", "reasoning", "solve"),
        _reason,
        "luthier solve 'f=5;f+2=b;b*3=q;q?' --model {reasoner}/model --method ssr:steps=lines,prompts=short",
        (("trace", "trace.html"),),
    ),
    System(
        "distill",
        "Generative Adversarial Distillation, arXiv 2511.10643",
        ("seqkd", "distill", "gauge"),
        _distill,
        "luthier run recipes/gad-tiny.yaml",
    ),
)
