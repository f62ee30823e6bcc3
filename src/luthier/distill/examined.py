"""What student and discriminator do on prompts that neither has learned from: before the adversarial stage, and after.

The figures are one a prompt, so that before and after are compared in pairs, and intervals are over prompts. Samples
come from random numbers of their own: measuring changes nothing of the training around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from luthier.core.seeds import derive_seed
from luthier.core.stats import Interval, bootstrap_mean, paired_difference
from luthier.distill.gad_trainer import GADTrainer
from luthier.distill.gate import as_texts, baseline_wins, per_prompt
from luthier.distill.objective import pair_accuracy
from luthier.distill.replies import Duels, make_duels

PROMPTS = 512  # at most, on either side
SAMPLES = 2  # for each: more prompts say more than more samples
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One number a held-out prompt, of `SAMPLES` replies each; lengths in tokens with the end."""

    accuracy: list[float]
    """Share of pairs in which the discriminator puts the teacher's reply above the student's."""
    baselines: dict[str, list[float]]
    """The same of classifiers that see length, or n-grams; fitted on samples for training prompts."""
    length: list[float]
    teacher_length: list[float]
    cut: list[float]
    """Share of the student's replies that are cut at the limit."""
    unique_share: float
    """Different replies of the student over all of them."""


def examine(trainer: GADTrainer, train: Sequence[Row], held_out: Sequence[Row], seed: int) -> Examined:
    """Sample the trainer's student on the first prompts of both sides. All ranks call it and get the same figures."""
    with own_randomness(trainer, seed):
        seen, unseen = (sample(trainer, list(islice(rows, PROMPTS))) for rows in (train, held_out))
    scores = trainer.adversary.scores(unseen)
    end = trainer._tokenizer.eos_token_id
    cut = torch.tensor([float(reply[-1:] != [end]) for reply in unseen.students])

    def over(values: Tensor) -> list[float]:
        return per_prompt(values.cpu().float(), unseen.owner.cpu())

    return Examined(
        accuracy=over(pair_accuracy(*scores, unseen.owner)),
        baselines=baseline_wins(as_texts(seen), as_texts(unseen)),
        length=over(unseen.student_lengths),
        teacher_length=[float(length) for length in unseen.teacher_lengths],
        cut=over(cut),
        unique_share=len({tuple(reply) for reply in unseen.students}) / len(unseen.students),
    )


@contextmanager
def own_randomness(trainer: GADTrainer, seed: int) -> Iterator[None]:
    """Random numbers from `seed` and the rank, and after it those that there would have been."""
    device = trainer.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "examined", trainer.accelerator.process_index))
        yield


def sample(trainer: GADTrainer, rows: Sequence[Row]) -> Duels:
    """`SAMPLES` replies of the student to each row, against the teacher's; ranks share the rows and all get all."""
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    mine = list(rows)[rank : len(rows) // world * world : world]  # as many on each rank: they sample together
    at_once = max(1, int(trainer.args.generation_batch_size or 1) // world // SAMPLES)
    found: list[tuple[list[int], list[int], list[int]]] = []
    for start in range(0, len(mine), at_once):
        asked = [dict(row) for row in mine[start : start + at_once] for _ in range(SAMPLES)]
        duels = trainer.sample_duels(asked)
        owners = duels.owner.tolist()
        found += zip(duels.prompts, duels.students, [duels.teachers[p] for p in owners], strict=True)
    prompts, students, teachers = (list(side) for side in zip(*gather_object(found), strict=True))
    return make_duels(prompts, students, teachers, trainer.accelerator.device)


def compared(before: Examined, after: Examined) -> list[list[str]]:
    """Rows of a table: what, before, after, and the paired change with its interval."""
    names = {
        "discriminator's accuracy": "accuracy",
        "reply's length (tokens)": "length",
        "teacher's length (tokens)": "teacher_length",
        "cut at the limit": "cut",
    }
    rows = []
    for words, name in names.items():
        first, second = getattr(before, name), getattr(after, name)
        digits = 1 if "length" in name else 3
        change = paired_difference(second, first)
        rows.append([words, *(_mean(values).text(digits) for values in (first, second)), change.text(digits)])
    shares = before.unique_share, after.unique_share
    return [*rows, ["unique replies", *(f"{share:.3f}" for share in shares), f"{shares[1] - shares[0]:.3f}"]]


def _mean(values: Sequence[float]) -> Interval:
    return bootstrap_mean(values)
