"""What two alarms look at and training does not tell: quality at matched lengths, and a fresh discriminator (§8.6).

After each evaluation the student is sampled on held-out prompts once more, from random numbers of their own: training
goes on as without. Where the teacher is known exactly, quality is whether it could have written a reply; of others it
is how many n-grams a reply shares with the teacher's. Both are read at the teacher's lengths, since short replies are
valid more often and long ones share more.

A fresh discriminator starts from the warmed-up student, or from the model of its own that the live one began with, and
learns for a few updates from the current student's samples for prompts to learn from. Where it then tells held-out
replies far better than the live one, the student has found what the live one does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.data.row_source import turns
from luthier.data.tokenizer import decode_text
from luthier.distill.adversary import Adversary
from luthier.distill.alarms import FRESH, QUALITY
from luthier.distill.bracket_teacher import BracketTeacher
from luthier.distill.discriminator import Discriminator
from luthier.distill.examined import PROMPTS, own_randomness, sample
from luthier.distill.gad_trainer import GADTrainer
from luthier.distill.lessons import Lessons
from luthier.distill.metrics import Matched, matched_mean, ngram_f1
from luthier.distill.replies import Duels, Ids, make_duels

ORDERS = (1, 2, 3, 4)
BATCH = 64  # prompts in an update of the fresh discriminator
Quality = Callable[[Any, Ids, Ids], float]
"""Of a reply: prompt as in the rows, ids of the student's reply and of the teacher's, with their ends."""


def overlap_quality(prompt: Any, reply: Ids, teacher: Ids) -> float:
    """Mean F1 of n-grams of tokens, n from 1 to 4, that a reply shares with the teacher's; ends are tokens."""
    scores = [ngram_f1(reply, teacher, n) for n in ORDERS]
    return float(np.mean([score for score in scores if score is not None]))


def exact_quality(teacher: BracketTeacher, tokenizer: PreTrainedTokenizerFast) -> Quality:
    """1 for a whole reply that the teacher can write, else 0."""

    def quality(prompt: Any, reply: Ids, _: Ids) -> float:
        if reply[-1:] != [tokenizer.eos_token_id]:
            return 0.0
        asked = turns("user", prompt)[-1]["content"]
        return float(teacher.is_valid(asked, decode_text(tokenizer, reply[:-1])))

    return quality


def matched_quality(duels: Duels, prompts: Mapping[tuple[int, ...], Any], quality: Quality) -> Matched:
    """Mean quality of the student's replies at the teacher's lengths; `prompts`: rows' prompts by their ids."""
    sides = zip(duels.prompts, duels.students, duels.owner.tolist(), strict=True)
    values = [quality(prompts[tuple(ids)], reply, duels.teachers[owner]) for ids, reply, owner in sides]
    return matched_mean(values, [len(reply) for reply in duels.students], [len(reply) for reply in duels.teachers])


def fresh_accuracy(fresh: Adversary, seen: Duels, unseen: Duels, steps: int) -> float:
    """Accuracy on `unseen` after `steps` updates on `seen`, both of all ranks; each rank takes its share of a batch."""
    world, rank = fresh.accelerator.num_processes, fresh.accelerator.process_index
    pairs = np.arange(len(seen.students))
    samples = -(-len(pairs) // len(seen.teachers))
    parts = np.array_split(pairs, max(1, len(pairs) // (BATCH * samples)))
    for step in range(steps):
        fresh.update(part_of(seen, parts[step % len(parts)][rank::world].tolist()))
    return float(fresh.accuracy(fresh.scores(unseen), unseen).mean())


def part_of(duels: Duels, rows: Sequence[int]) -> Duels:
    """Some of the student replies with the teacher replies that they meet."""
    owners = duels.owner.tolist()
    prompts, students, teachers = zip(
        *((duels.prompts[row], duels.students[row], duels.teachers[owners[row]]) for row in rows), strict=True
    )
    return make_duels(list(prompts), list(students), list(teachers), duels.owner.device)


class Auditor(TrainerCallback):
    """Logs `alarms.QUALITY` after each evaluation, where the teacher's lengths are covered, and `alarms.FRESH`.

    `fresh` makes a discriminator that has learned nothing yet; it learns for `steps` updates. 0: there is none, and no
    memory for it.
    """

    def __init__(
        self,
        trainer: GADTrainer,
        lessons: Lessons,
        quality: Quality,
        *,
        seed: int,
        fresh: Callable[[], Discriminator],
        steps: int = 0,
    ) -> None:
        self.trainer, self.quality, self.seed = trainer, quality, seed
        self.fresh, self.steps = fresh, steps
        self.rows = [list(islice(rows, PROMPTS)) for rows in (lessons.train, lessons.held_out)]
        self.prompts = {tuple(lessons.encode(row["prompt"])): row["prompt"] for row in self.rows[1]}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sample, measure, and log."""
        told = dict[str, float]()
        with own_randomness(self.trainer, self.seed):  # making a network draws random numbers too
            unseen = sample(self.trainer, self.rows[1])
            found = matched_quality(unseen, self.prompts, self.quality).value
            if found is not None:
                told[QUALITY] = found
            if self.steps:
                adversary = Adversary(self.fresh(), self.trainer.accelerator, self.trainer.args.adversary)
                seen = sample(self.trainer, self.rows[0])
                told[FRESH] = fresh_accuracy(adversary, seen, unseen, self.steps)
        if told:
            self.trainer.log(told)
