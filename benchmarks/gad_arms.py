"""Does adversarial distillation beat fine-tuning on the same replies? A small student of a known teacher.

The teacher writes brackets (`luthier.distill.bracket_teacher`). The student is an Instella of one layer, too small for
them: fine-tuned on the teacher's replies (SeqKD), it writes as much that is wrong as right, and learns slowly. The
discriminator is larger; it too learned to write from the teacher's replies first, then to tell the student's samples
from them. The setting is one in which it can know something (`--gate` tells of each seed what): brackets of eight
types, and a teacher that opens readily, so that replies of both have the same lengths and mostly nest too deep for
n-grams. All arms start from these two and see the same replies:

  SeqKD                      the start itself
  SeqKD, same samples        fine-tuned on, with as many replies as the arms with rewards sample
  SeqKD, same time           fine-tuned on, for as many seconds
  SeqKD, D's time too        fine-tuned on, for as many seconds as these arms and the discriminator's warm-up together
  best of 8 by D             the start's best sample in the eyes of the warmed-up discriminator
  white box                  GKD: probabilities of a teacher that tells them, on as many samples of the student's own
  DPO                        teacher's replies preferred to the start's own (SODA)
  GAD; GAD, length residual  GRPO against a discriminator that learns along; its score without what length explains
  GAD, token credit          each token is credited with what the score rises by at it
  GAD, unsure tokens         the student learns only from the half of the tokens where its entropy is largest
  D frozen, length, random   the same with a discriminator that stays as it is, a reward for length alone, and noise

Each is measured at several temperatures. The primary figure was fixed beforehand: validity at the teacher's lengths
(`metrics.matched_mean`). Checkpoint and temperature are chosen by it on validation prompts; test prompts are others.

    python benchmarks/gad_arms.py [--seeds 1 2 3 4 5] [--out runs/gad_arms] [--gate] [--figure gad_arms.svg]

Each seed is another teacher, other replies and other initial weights; the setting was found on seed 0. Finished arms
are kept in --out: the same command goes on where it stopped, and appends one row to results/ when all are done;
--record appends one with the seeds so far; --gate stops after the starts. Other settings below have another folder in
--out.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from gad_table import TEMPERATURES, at, draw, summarize
from gad_world import (
    BATCH,
    CPU,
    CRITIC,
    MATCHED,
    STUDENT,
    WORLD,
    Row,
    World,
    accuracy,
    descend,
    guided,
    lessons,
    measure,
    picks,
    prompt_means,
    quality,
    reply_nats,
    sample,
    tell_apart,
)
from record import record
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from luthier.core.config import digest
from luthier.core.files import append_jsonl, read_jsonl
from luthier.core.seeds import derive_seed
from luthier.data.tokenizer import encode_texts
from luthier.distill.adversary import Adversary, AdversarySettings
from luthier.distill.alarms import AlarmCallback
from luthier.distill.baselines import best_of_n, best_temperature
from luthier.distill.discriminator import Discriminator, load_discriminator, save_discriminator
from luthier.distill.gad_config import GADConfig
from luthier.distill.gad_trainer import GADTrainer
from luthier.distill.gate import as_texts, baseline_wins, gate, per_prompt
from luthier.distill.objective import pair_accuracy
from luthier.distill.replies import make_duels
from luthier.distill.teacher import preferences
from luthier.models.load import load_pretrained, save_pretrained
from luthier.train.dpo import dpo_loss, margins

WARM_STEPS, WARM_RATE = 2400, 5e-3  # of SeqKD, with a rate that falls to 0
WRITE_STEPS, WRITE_RATE = 1500, 3e-3  # the discriminator's network learns to write
WARM_D_STEPS, WARM_D_RATE = 1200, 1e-3  # then to tell apart, at a rate that falls to 0 as well
STEPS, EVERY, PROMPTS, SAMPLES = 200, 20, 32, 8  # of an arm with a reward; looks at it; prompts and samples per step
RATE, D_RATE, D_STEPS, BETA = 3e-4, 3e-4, 2, 0.01
SAME_TIME_STEPS = 5000  # of SeqKD, that take as long as an arm with a reward
WHOLE_TIME_STEPS = 15_000  # and as long as that and the discriminator's warm-up
DPO_STEPS, DPO_BATCH, DPO_RATE, DPO_BETA = 120, 64, 3e-4, 0.1
BEST_OF = 8
SETTINGS = (
    WORLD,
    TEMPERATURES,
    *(WARM_STEPS, WARM_RATE, WRITE_STEPS, WRITE_RATE, WARM_D_STEPS, WARM_D_RATE),
    *(STEPS, EVERY, PROMPTS, SAMPLES, RATE, D_RATE, D_STEPS, BETA),
    *(SAME_TIME_STEPS, WHOLE_TIME_STEPS, DPO_STEPS, DPO_BATCH, DPO_RATE, DPO_BETA, BEST_OF),
)

Settings = Mapping[str, Any]
ADVERSARIAL: dict[str, Settings] = {
    "GAD": {},
    "GAD, length residual": {"adversarial_reward": "residual"},
    "GAD, token credit": {"adversarial_credit": "tokens"},
    "GAD, unsure tokens": {"top_entropy_quantile": 0.5},
    "D frozen": {"discriminator_frozen": True},
    "reward: length": {"adversarial_reward": "length"},
    "reward: random": {"adversarial_reward": "random"},
}


# The start: a student that was fine-tuned, and a discriminator that learned beside it.


def common(folder: Path, seed: int) -> dict[str, Any]:
    """Settings of every trainer here."""
    return {
        "output_dir": str(folder / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "temperature": 1.0,
        "max_grad_norm": 1.0,
        "discriminator_max_grad_norm": 1.0,
        "discriminator_micro_batch_size": 256,
        "seed": seed,
    }


def warm_up(world: World, folder: Path) -> None:
    """Write student and discriminator of one seed to folders: SeqKD of both, then D on the student's samples."""
    student, critic = world.model(STUDENT), world.model(CRITIC)
    for model, steps, rate in ((student, WARM_STEPS, WARM_RATE), (critic, WRITE_STEPS, WRITE_RATE)):
        for _ in descend(model, lessons(world, model), steps, rate):
            pass
    settings = AdversarySettings(learning_rate=WARM_D_RATE, micro_batch_size=256, max_grad_norm=1.0)
    adversary = Adversary(Discriminator.of(critic, seed=world.seed), Accelerator(cpu=True), settings)
    tell_apart(world, student.eval(), adversary, WARM_D_STEPS)
    save_discriminator(adversary.discriminator, world.tokenizer, folder / "discriminator", {"verb": "benchmark"})
    save_pretrained(student, world.tokenizer, folder / "student", {"verb": "benchmark"})  # last: it says that both are


@dataclass(frozen=True)
class Start:
    """What the arms of one seed start from."""

    world: World
    folder: Path

    @classmethod
    def of(cls, world: World, folder: Path) -> Start:
        """Read it, or make it first."""
        if not (folder / "student").exists():
            warm_up(world, folder)
        return cls(world, folder)

    def student(self) -> Any:
        """A fresh copy."""
        return load_pretrained(self.folder / "student", dtype=torch.float32)

    def discriminator(self) -> Discriminator:
        """A fresh copy."""
        return load_discriminator(self.folder / "discriminator")

    def adversary(self) -> Adversary:
        """The warmed-up discriminator, to be asked only."""
        return Adversary(self.discriminator(), Accelerator(cpu=True), AdversarySettings(micro_batch_size=256))

    def gate(self) -> Row:
        """What the discriminator knows beyond length and n-grams, on test prompts."""
        world, student = self.world, self.student().eval()
        train, held_out = (
            world.duels(split, sample(student, world.prompts(split), world.cap, world.generator("gate", split)).replies)
            for split in ("train", "test")
        )
        few = make_duels(train.prompts[::4], train.students[::4], [train.teachers[p] for p in train.owner[::4]], CPU)
        right = pair_accuracy(*self.adversary().scores(held_out), held_out.owner)
        shares = {"D": per_prompt(right, held_out.owner), **baseline_wins(as_texts(few), as_texts(held_out))}
        wins = {name: prompt_means(held_out, values) for name, values in shares.items()}
        found = gate(wins.pop("D"), wins)
        return {"open": found.is_open, "gate": found.text()}


# What becomes of a student: looks at it on validation prompts while it learns, and measures on test prompts after.


class Course:
    """A curve on validation prompts, and the weights of its best point by matched validity."""

    def __init__(self, world: World, model: Any, adversary: Adversary) -> None:
        self.world, self.model, self.adversary = world, model, adversary
        self.curve = list[Row]()
        self.best, self.weights = -1.0, dict[str, Tensor]()
        self.accuracy = float("nan")

    def look(self, step: int) -> Row:
        """Measure, and keep the weights if they are the best so far."""
        was_training = self.model.training
        found = measure(self.world, "validation", self.model)
        right, score = accuracy(self.world, "validation", self.model, self.adversary)
        self.curve.append({"step": step, **found, "d_acc": right, "score": score})
        if step and (found[MATCHED] or 0.0) > self.best:
            self.best = found[MATCHED] or 0.0
            self.weights = copy.deepcopy(self.model.state_dict())
            self.accuracy = accuracy(self.world, "test", self.model, self.adversary)[0]
        self.model.train(was_training)
        return self.curve[-1]

    def outcome(self) -> Row:
        """The last weights and the best ones on test prompts, the latter at every temperature."""
        last = measure(self.world, "test", self.model)
        last["d_acc"] = accuracy(self.world, "test", self.model, self.adversary)[0]
        self.model.load_state_dict(self.weights)
        return {"last": last, "d_acc": self.accuracy, **at_temperatures(self.world, self.model), "curve": self.curve}


def at_temperatures(world: World, model: Any) -> Row:
    """Test figures at every temperature, and the one that validation prompts choose; 1 where nothing is known."""
    matched = {t: measure(world, "validation", model, t)[MATCHED] for t in TEMPERATURES}
    known = any(value is not None for value in matched.values())
    return {
        "temperature": best_temperature(matched) if known else 1.0,
        "test": {str(t): measure(world, "test", model, t) for t in TEMPERATURES},
    }


class Watch(TrainerCallback):
    """Looks every few steps, and tells the trainer what was seen, for its alarms."""

    def __init__(self, course: Course, trainer: GADTrainer) -> None:
        self.course, self.trainer = course, trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % EVERY == 0:
            seen = self.course.look(state.global_step)
            told = {"eval_discriminator/accuracy": seen["d_acc"]}
            self.trainer.log(told | ({"eval_matched_quality": seen[MATCHED]} if seen[MATCHED] is not None else {}))


def adversarial(start: Start, settings: Settings) -> Row:
    """One arm with a reward."""
    world, student = start.world, start.student()
    config = GADConfig(
        **common(start.folder, world.seed) | {"logging_strategy": "steps", "logging_steps": 1},
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_steps=STEPS,
        max_completion_length=world.cap,
        learning_rate=RATE,
        discriminator_learning_rate=D_RATE,
        discriminator_steps=D_STEPS,
        beta=BETA,
        **settings,
    )
    data = Dataset.from_list(world.rows["train"])
    trainer = GADTrainer(student, start.discriminator(), config, data, processing_class=world.tokenizer)
    course, alarms = (
        Course(world, student, trainer.adversary),
        AlarmCallback(trainer, actions=(), tell=lambda words: None),
    )
    course.look(0)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(alarms)
    trainer.add_callback(Watch(course, trainer))
    trainer.train()
    return course.outcome() | {"alarms": sorted({name for _, name, _ in alarms.told})}


# The arms without a reward.


def fit(model: Any, course: Course, losses: Iterator[Tensor], steps: int, every: int, rate: float) -> Row:
    """Descend on losses; the outcome."""
    for step in descend(model, losses, steps, rate):
        if step % every == 0:
            course.look(step)
    return course.outcome()


def longer(start: Start, steps: int) -> Row:
    """SeqKD goes on."""
    world, model = start.world, start.student()
    course = Course(world, model, start.adversary())
    return fit(model, course, lessons(world, model), steps, steps * EVERY // STEPS, WARM_RATE / 3)


def white_box(start: Start) -> Row:
    """What a teacher that tells its probabilities would be worth."""
    world, model = start.world, start.student()
    course = Course(world, model, start.adversary())
    return fit(model, course, guided(world, model, PROMPTS * SAMPLES), STEPS, EVERY, WARM_RATE / 3)


def preferring(start: Start) -> Row:
    """DPO on pairs of the teacher's reply and the start's own."""
    world, model = start.world, start.student().eval()
    own = sample(model, world.prompts("train"), world.cap, world.generator("rejected")).replies
    both = zip(world.rows["train"], own, strict=True)
    rejected = [row | {"completion": world.text(ids)} for row, ids in both if world.ended(ids)]
    pairs = list(preferences(world.rows["train"], rejected))
    end = [world.tokenizer.eos_token_id]
    prompts = encode_texts(world.tokenizer, [pair["prompt"] for pair in pairs])
    sides = [
        [ids + end for ids in encode_texts(world.tokenizer, [pair[side] for pair in pairs])]
        for side in ("chosen", "rejected")
    ]

    def logprobs(rows: list[int]) -> Tensor:
        of = [-reply_nats(model, [prompts[n] for n in rows], [side[n] for n in rows]).sum(1) for side in sides]
        return torch.stack(of, 1)

    with torch.no_grad():
        reference = torch.cat(
            [logprobs(list(part)) for part in np.array_split(range(len(pairs)), 1 + len(pairs) // 512)]
        )
    lengths = torch.tensor([[len(ids) for ids in side] for side in sides]).T

    def losses() -> Iterator[Tensor]:
        for rows in picks(world, len(pairs), DPO_BATCH):
            yield dpo_loss(margins(logprobs(rows), reference[rows], lengths[rows], "sum"), DPO_BETA)

    course = Course(world, model, start.adversary())
    return fit(model, course, losses(), DPO_STEPS, DPO_STEPS * EVERY // STEPS, DPO_RATE)


def itself(start: Start) -> Row:
    """The start, and what its discriminator knows."""
    student, adversary = start.student(), start.adversary()
    right = accuracy(start.world, "test", student, adversary)[0]
    found = at_temperatures(start.world, student)
    return found | {"last": found["test"]["1.0"], "d_acc": right, "curve": [], **start.gate()}


def best_of(start: Start) -> Row:
    """The start's best samples by the score of its discriminator. No probabilities, so no divergences."""
    world, student, adversary = start.world, start.student().eval(), start.adversary()

    def chosen(split: str, temperature: float) -> Row:
        generator = world.generator("best of", split, temperature)
        prompts = world.prompts(split)
        drawn = [sample(student, prompts, world.cap, generator, temperature).replies for _ in range(BEST_OF)]
        scores = [adversary.scores(world.duels(split, ids))[0].tolist() for ids in drawn]
        scored = [list(zip(ids, score, strict=True)) for ids, score in zip(drawn, scores, strict=True)]
        best = best_of_n(list(zip(*scored, strict=True)), lambda group: [score for _, score in group])
        return quality(world, split, [ids for ids, _ in best])

    temperature = best_temperature({t: chosen("validation", t)[MATCHED] for t in TEMPERATURES})
    found = {str(t): chosen("test", t) for t in TEMPERATURES}
    return {"temperature": temperature, "test": found, "last": found["1.0"], "curve": []}


PLAIN: dict[str, Callable[[Start], Row]] = {
    "SeqKD": itself,
    "SeqKD, same samples": partial(longer, steps=STEPS * PROMPTS * SAMPLES // BATCH),
    "SeqKD, same time": partial(longer, steps=SAME_TIME_STEPS),
    "SeqKD, D's time too": partial(longer, steps=WHOLE_TIME_STEPS),
    f"best of {BEST_OF} by D": best_of,
    "white box": white_box,
    "DPO": preferring,
}
ARMS = (*PLAIN, *ADVERSARIAL)


def run_arm(arm: str, start: Start) -> Row:
    """Everything that is kept of one arm and seed."""
    began = time.process_time()
    torch.manual_seed(derive_seed(start.world.seed, arm))
    found = PLAIN[arm](start) if arm in PLAIN else adversarial(start, ADVERSARIAL[arm])
    return {"arm": arm, "seed": start.world.seed, **found, "cpu_seconds": round(time.process_time() - began, 1)}


# The seeds.


def finished(rows: Sequence[Row], seeds: Sequence[int]) -> list[int]:
    """The seeds of which every arm is done."""
    done = {(row["arm"], row["seed"]) for row in rows}
    return [seed for seed in seeds if all((arm, seed) in done for arm in ARMS)]


def run_seed(seed: int, folder: Path, rows: list[Row]) -> None:
    """Run what is missing of one seed, appending rows."""
    missing = [arm for arm in ARMS if (arm, seed) not in {(row["arm"], row["seed"]) for row in rows}]
    if not missing:
        return
    start = Start.of(World.make(seed), folder / f"seed-{seed}")
    for arm in missing:
        rows.append(run_arm(arm, start))
        append_jsonl(folder / "rows.jsonl", rows[-1])
        one, best = at(rows[-1], 1.0)[MATCHED], at(rows[-1], None)[MATCHED]
        print(f"seed {seed}, {arm}: {one} at temperature 1, {best} at {rows[-1]['temperature']}", flush=True)


def main() -> None:
    """Run the arms and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/gad_arms"))
    parser.add_argument("--gate", action="store_true", help="make the starts, print what D knows, and stop")
    parser.add_argument("--figure", type=Path, help="draw GAD and the frozen discriminator step by step")
    parser.add_argument("--record", action="store_true", help="append a row with the seeds that are done, and stop")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = options.out / digest(SETTINGS)[:8]
    if options.gate:
        for seed in options.seeds:
            print(f"seed {seed}:", Start.of(World.make(seed), folder / f"seed-{seed}").gate(), flush=True)
        return
    rows = read_jsonl(folder / "rows.jsonl")
    for seed in () if options.record else options.seeds:
        run_seed(seed, folder, rows)
    seeds = finished(rows, options.seeds)
    if not seeds:
        raise SystemExit("no seed is finished: run without --record first")
    summary = summarize(rows, ARMS, seeds)
    gates = [row["gate"] for row in rows if row["arm"] == "SeqKD" and row["seed"] in seeds]
    alarms = {
        arm: [row.get("alarms") for row in rows if row["arm"] == arm and row["seed"] in seeds] for arm in ADVERSARIAL
    }
    record("gad_arms", seeds=seeds, rows=summary, gates=gates, alarms=alarms)
    for told in summary:
        print(*told.values(), sep=" | ")
    if options.figure:
        draw(rows, seeds, options.figure)


if __name__ == "__main__":
    main()
