"""The world of gad_arms.py: a teacher and its replies, a student and its samples, and what can be said of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from luthier.core.seeds import derive_seed
from luthier.data.tokenizer import decode_text, encode_texts
from luthier.distill.adversary import Adversary
from luthier.distill.bracket_teacher import SYMBOLS, BracketTeacher
from luthier.distill.metrics import forward_kl, matched_mean, reverse_kl, smoothed, unique_share
from luthier.distill.replies import Duels, Ids, make_duels
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config

CPU = torch.device("cpu")
TYPES, MAX_TOKENS, OPENING = 8, 10, 0.8
STUDENT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CRITIC = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SPLITS = {"train": (320, 16), "validation": (64, 6), "test": (128, 4)}  # prompts, the teacher's replies to each
BATCH = 128  # replies of a step of SeqKD
WORLD = (TYPES, MAX_TOKENS, OPENING, STUDENT, CRITIC, SPLITS, BATCH)
MATCHED = "matched"
END, PADDING = "$", "_"
Row = dict[str, Any]


def bracket_tokenizer(teacher: BracketTeacher) -> PreTrainedTokenizerFast:
    """A token for each letter of prompts and each bracket, after the two special ones; a token is one character."""
    letters = [END, PADDING, *SYMBOLS[: teacher.symbols], *teacher.tokens]
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token=PADDING))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=PADDING)


@dataclass(frozen=True)
class World:
    """The teacher of one seed, and its replies: rows of `prompt` and `completion`, those of a prompt together."""

    seed: int
    teacher: BracketTeacher
    tokenizer: PreTrainedTokenizerFast
    rows: Mapping[str, list[Row]]

    @classmethod
    def make(cls, seed: int) -> World:
        """Everything follows from the seed."""
        teacher = BracketTeacher(types=TYPES, max_tokens=MAX_TOKENS, opening=OPENING, type_spread=0.0, table_seed=seed)
        prompts = iter(teacher.prompts(sum(count for count, _ in SPLITS.values()), seed))
        rng = random.Random(derive_seed(seed, "teacher's replies"))
        rows = {
            split: [
                {"prompt": prompt, "completion": teacher.draw(prompt, rng), "id": prompt, "sample": k, "split": split}
                for prompt in [next(prompts) for _ in range(count)]
                for k in range(replies)
            ]
            for split, (count, replies) in SPLITS.items()
        }
        return cls(seed, teacher, bracket_tokenizer(teacher), rows)

    @property
    def cap(self) -> int:
        """Most tokens of a student's reply, the end counted: two more than the teacher can write."""
        return self.teacher.max_tokens + 3

    def prompts(self, split: str) -> list[Ids]:
        """The prompt of each row, as ids."""
        return encode_texts(self.tokenizer, [row["prompt"] for row in self.rows[split]])

    def replies(self, split: str) -> list[Ids]:
        """The teacher's reply of each row, as ids with the end."""
        ends = [self.tokenizer.eos_token_id]
        return [ids + ends for ids in encode_texts(self.tokenizer, [row["completion"] for row in self.rows[split]])]

    def text(self, reply: Ids) -> str:
        """A reply without its end."""
        return decode_text(self.tokenizer, reply[: len(reply) - self.ended(reply)])

    def ended(self, reply: Ids) -> bool:
        """Whether a reply has an end."""
        return reply[-1] == self.tokenizer.eos_token_id

    def duels(self, split: str, sampled: list[Ids]) -> Duels:
        """A student's reply to each row against the teacher's."""
        return make_duels(self.prompts(split), sampled, self.replies(split), CPU)

    def generator(self, *names: str | int | float) -> torch.Generator:
        """Random numbers for one purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *map(str, names)))

    def model(self, shape: Mapping[str, int]) -> InstellaForCausalLM:
        """A language model with random weights."""
        model = InstellaForCausalLM(sized_config("nano", self.tokenizer, max_position_embeddings=64, **shape))
        initialize(model, derive_seed(self.seed, "student"))
        return model


# Sampling and scoring. All prompts have one length, so nothing is padded on the left.


class Sampled(NamedTuple):
    """A reply for each prompt, with its end if it has one, and its log-probability as it was sampled, nats."""

    replies: list[Ids]
    logprobs: list[float]


@torch.no_grad()
def sample(model: Any, prompts: list[Ids], cap: int, generator: torch.Generator, temperature: float = 1.0) -> Sampled:
    """One reply to each prompt, of `cap` tokens at most."""
    end, padding = model.config.eos_token_id, model.config.pad_token_id
    ids, cache, drawn = torch.tensor(prompts), None, list[Tensor]()
    total, done = torch.zeros(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(cap):
        output = model(input_ids=ids, cache=cache, use_cache=True)
        cache = output.cache
        logprobs = (output.logits[:, -1].float() / temperature).log_softmax(-1)
        ids = torch.multinomial(logprobs.exp(), 1, generator=generator)
        total += logprobs.gather(1, ids)[:, 0].masked_fill(done, 0)
        ids = ids.masked_fill(done[:, None], padding)
        drawn.append(ids)
        done = done | (ids[:, 0] == end)
        if done.all():
            break
    rows = torch.cat(drawn, 1).tolist()
    return Sampled([row[: row.index(end) + 1] if end in row else row for row in rows], total.tolist())


def reply_nats(model: Any, prompts: list[Ids], replies: Sequence[Ids], temperature: float = 1.0) -> Tensor:
    """(N, T) nats of each reply's tokens, 0 after its end."""
    start, longest = len(prompts[0]), max(map(len, replies))
    padding = model.config.pad_token_id
    ids = torch.tensor([[*p, *r, *[padding] * (longest - len(r))] for p, r in zip(prompts, replies, strict=True)])
    labels = ids[:, start:].masked_fill(ids[:, start:] == padding, -100)
    logits = model(input_ids=ids, use_cache=False).logits[:, start - 1 : -1].float() / temperature
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def is_valid(world: World, prompt: str, reply: Ids) -> bool:
    """Whether the teacher could have written it."""
    return world.ended(reply) and world.teacher.is_valid(prompt, world.text(reply))


def under_teacher(world: World, prompt: str, reply: Ids) -> float:
    """Log-probability under the smoothed teacher, nats."""
    text = world.text(reply)
    rows = world.teacher.conditionals(prompt, text)[: len(reply)]
    tokens = [world.teacher.tokens.find(letter) for letter in text] + [world.teacher.end] * world.ended(reply)
    return smoothed(rows, tokens)


def quality(world: World, split: str, replies: list[Ids]) -> Row:
    """What can be said of replies to all rows of a split."""
    prompts, lengths = [row["prompt"] for row in world.rows[split]], [len(ids) for ids in replies]
    valid = [is_valid(world, prompt, ids) for prompt, ids in zip(prompts, replies, strict=True)]
    matched = matched_mean(valid, lengths, [len(ids) for ids in world.replies(split)], least=20)
    return {
        MATCHED: matched.value,
        "covered": matched.covered,
        "valid": float(np.mean(valid)),
        "length": float(np.mean(lengths)),
        "unique": unique_share([tuple(ids) for ids in replies]),
    }


def measure(world: World, split: str, model: Any, temperature: float = 1.0) -> Row:
    """Quality of one sample for each row of a split, and both divergences, nats per reply."""
    model.eval()
    generator = world.generator("measured", split, temperature)
    sampled = sample(model, world.prompts(split), world.cap, generator, temperature)
    prompts, replies = [row["prompt"] for row in world.rows[split]], world.replies(split)
    smooth = [under_teacher(world, prompt, ids) for prompt, ids in zip(prompts, sampled.replies, strict=True)]
    truth = [world.teacher.log_probability(row["prompt"], row["completion"]) for row in world.rows[split]]
    with torch.no_grad():
        known = -reply_nats(model, world.prompts(split), replies, temperature).sum(1)
    return quality(world, split, sampled.replies) | {
        "forward_kl": forward_kl(truth, known.tolist()).value,
        "reverse_kl": reverse_kl(sampled.logprobs, smooth).value,
    }


def accuracy(world: World, split: str, model: Any, adversary: Adversary) -> tuple[float, float]:
    """Share of pairs that the discriminator ranks rightly, and the mean score of the student's replies."""
    model.eval()
    generator = world.generator("duels", split)
    duels = world.duels(split, sample(model, world.prompts(split), world.cap, generator).replies)
    scores = adversary.scores(duels)
    return float(adversary.accuracy(scores, duels).mean()), float(scores[0].mean())


def prompt_means(duels: Duels, values: Sequence[float]) -> list[float]:
    """Means over the teacher's replies to a prompt, of one value for each."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for (prompt, _), value in zip(duels.sequences()[len(duels.students) :], values, strict=True):
        groups.setdefault(tuple(prompt), []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


# Learning from the teacher's replies.


def descend(model: Any, losses: Iterator[Tensor], steps: int, rate: float) -> Iterator[int]:
    """Descend on losses at a rate that falls to 0; yields the number of every step, after it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


def picks(world: World, rows: int, batch: int) -> Iterator[list[int]]:
    """Random rows without end."""
    generator = world.generator("batches")
    while True:
        yield torch.randint(rows, (batch,), generator=generator).tolist()


def lessons(world: World, model: Any) -> Iterator[Tensor]:
    """SeqKD: cross-entropy on random replies of the teacher, nats per token."""
    prompts, replies = world.prompts("train"), world.replies("train")
    for rows in picks(world, len(replies), BATCH):
        nats = reply_nats(model, [prompts[n] for n in rows], [replies[n] for n in rows])
        yield nats.sum() / sum(len(replies[n]) for n in rows)


def next_tokens(world: World, prompts: Sequence[str], replies: Sequence[Ids]) -> Tensor:
    """(N, T, V) probabilities of the teacher for each token of the replies; zeros after what it cannot write."""
    ids = [row[0] for row in encode_texts(world.tokenizer, list(world.teacher.tokens))] + [world.tokenizer.eos_token_id]
    found = torch.zeros(len(replies), max(map(len, replies)), len(world.tokenizer))
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        known = torch.from_numpy(world.teacher.conditionals(prompt, world.text(reply)))[: len(reply)]
        found[row, : len(known), ids] = known.nan_to_num().float()
    return found


def guided(world: World, model: Any, batch: int) -> Iterator[Tensor]:
    """GKD, arXiv 2306.13649: Jensen-Shannon divergence to the teacher on the student's own samples, nats per token."""
    prompts, generator = world.prompts("train"), world.generator("guided")
    for rows in picks(world, len(prompts), batch):
        asked = [prompts[n] for n in rows]
        replies = sample(model, asked, world.cap, generator).replies
        teacher = next_tokens(world, [world.rows["train"][n]["prompt"] for n in rows], replies)
        longest, padding = teacher.shape[1], model.config.pad_token_id
        ids = torch.tensor([[*p, *r, *[padding] * (longest - len(r))] for p, r in zip(asked, replies, strict=True)])
        student = model(input_ids=ids, use_cache=False).logits[:, -longest - 1 : -1].float().softmax(-1)
        mixed = ((teacher + student) / 2).clamp(min=1e-12).log()
        apart = sum((p * (p.clamp(min=1e-12).log() - mixed)).sum(-1) for p in (teacher, student)) / 2
        known = teacher.sum(-1) > 0
        yield apart[known].sum() / known.sum()


def tell_apart(world: World, student: Any, adversary: Adversary, steps: int) -> None:
    """The discriminator alone learns from the student's samples, at a rate that falls to 0."""
    prompts, replies, generator = world.prompts("train"), world.replies("train"), world.generator("told apart")
    schedule = torch.optim.lr_scheduler.LinearLR(adversary.optimizer, 1.0, 0.0, steps)
    for rows in islice(picks(world, len(replies), BATCH), steps):
        asked = [prompts[n] for n in rows]
        sampled = sample(student, asked, world.cap, generator).replies
        adversary.update(make_duels(asked, sampled, [replies[n] for n in rows], CPU))
        schedule.step()
