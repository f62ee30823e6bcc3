"""A student measured against the bracket teacher, whose every probability is known: no judge, no estimate of quality.

Every figure is a mean over prompts, from the student's samples and, for the forward KL, from the teacher's. Read
together: a student that writes next to nothing has the best plain validity and reverse KL of all. The KL are exact
where the student's tokenizer has one token for each bracket, as a byte-level one; others spell a reply in several ways,
of which one is counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.seeds import derive_seed
from luthier.core.stats import Interval
from luthier.data.tokenizer import decode_text, encode_texts, num_ids
from luthier.distill.bracket_teacher import BracketTeacher
from luthier.distill.lessons import Encode
from luthier.distill.metrics import Floats, Matched, length_edges, matched_mean, smoothed
from luthier.distill.replies import Ids, pad_right
from luthier.llm.generation import Row, Vocabulary, generate
from luthier.llm.local import end_ids

AT_ONCE = 256  # sequences in a batch
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Gauged:
    """What was seen of a student, by prompt. Lengths are in the teacher's tokens, without the end."""

    valid: list[list[bool]]
    """Whether the teacher could have written each whole reply."""
    lengths: list[list[int]]
    teacher_lengths: list[list[int]]
    """Of the teacher's own samples."""
    forward: list[float]
    """Nats per reply of KL(teacher || student)."""
    reverse: list[float]
    """Nats per reply of KL(student || smoothed teacher)."""
    unique_share: float
    """Different pairs of prompt and reply over all."""

    @property
    def validity(self) -> list[float]:
        """Share of valid replies to each prompt."""
        return [float(np.mean(flags)) for flags in self.valid]

    @property
    def length(self) -> list[float]:
        """Mean length of the replies to each prompt."""
        return [float(np.mean(lengths)) for lengths in self.lengths]

    def matched(self) -> Matched:
        """Validity at the teacher's lengths."""
        sides = (self.valid, self.lengths, self.teacher_lengths)
        valid, lengths, theirs = (list(chain.from_iterable(side)) for side in sides)
        return matched_mean([float(flag) for flag in valid], lengths, theirs)


def gauge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    teacher: BracketTeacher,
    prompts: Sequence[str],
    encode: Encode,
    *,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Gauged:
    """Sample `samples` replies to each prompt from student and teacher, and measure them.

    encode: a prompt as the ids that the student reads. Every student and temperature meets the same teacher samples.
    """
    ids = [encode(prompt) for prompt in prompts]
    rows = _sample(model, tokenizer, teacher, ids, samples, temperature, seed)
    written = [teacher_replies(teacher, prompt, samples, seed) for prompt in prompts]
    ours, theirs = [_ended(row, tokenizer) for row in rows], _encoded(tokenizer, written)
    asked, size = [prompt for prompt in ids for _ in range(samples)], num_ids(tokenizer)
    own = reply_logprobs(model, list(zip(asked, ours, strict=True)), temperature)
    of_teacher = reply_logprobs(model, list(zip(asked, theirs, strict=True)), temperature)
    groups = [list(range(n * samples, (n + 1) * samples)) for n in range(len(prompts))]
    texts = [decode_text(tokenizer, row.ids) for row in rows]
    ended = [row.finish_reason == "stop" for row in rows]
    valid, forward, reverse = list[list[bool]](), list[float](), list[float]()
    for prompt, group, replies in zip(prompts, groups, written, strict=True):
        valid.append([ended[n] and teacher.is_valid(prompt, texts[n]) for n in group])
        surplus = [
            teacher.log_probability(prompt, reply) - of_teacher[n] for reply, n in zip(replies, group, strict=True)
        ]
        forward.append(float(np.mean(surplus)))
        reverse.append(float(np.mean([own[n] - _smoothed(teacher, prompt, texts[n], ended[n], size) for n in group])))
    return Gauged(
        valid=valid,
        lengths=[[len(texts[n]) for n in group] for group in groups],
        teacher_lengths=[[len(reply) for reply in replies] for replies in written],
        forward=forward,
        reverse=reverse,
        unique_share=len({(n // samples, text) for n, text in enumerate(texts)}) / len(texts),
    )


def teacher_replies(teacher: BracketTeacher, prompt: str, samples: int, seed: int) -> list[str]:
    """The teacher's own samples for a prompt."""
    return [teacher.draw(prompt, random.Random(derive_seed(seed, "gauge", prompt, n))) for n in range(samples)]


def _smoothed(teacher: BracketTeacher, prompt: str, text: str, ended: bool, size: int) -> float:
    """ln of the smoothed teacher's probability; of a reply that was cut, that of its beginning.

    size: tokens that the student can write. Over all of these the teacher is smoothed, or it would be no distribution
    over what the student does, and the divergence could be negative.
    """
    rows, tokens = teacher.conditionals(prompt, text), [teacher.tokens.find(character) for character in text]
    rows = np.pad(rows, ((0, 0), (0, max(0, size - rows.shape[1]))))
    return smoothed(rows, [*tokens, teacher.end]) if ended else smoothed(rows[:-1], tokens)


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    teacher: BracketTeacher,
    prompts: Sequence[Ids],
    samples: int,
    temperature: float,
    seed: int,
) -> list[Row]:
    """The student's replies, each with random numbers of its own; what is longer than the teacher's can be is cut."""
    known = int(next(model.get_input_embeddings().parameters()).shape[0])
    vocabulary = Vocabulary(
        size=min(num_ids(tokenizer), known),
        end_ids=end_ids(model, tokenizer),
        decode=lambda ids: decode_text(tokenizer, ids),
    )
    rows = [
        Row(
            prompt=prompt,
            max_tokens=teacher.max_tokens + 1,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            stop=(),
            seed=derive_seed(seed, "gauged", ",".join(map(str, prompt)), n),
            top_logprobs=None,
        )
        for prompt in prompts
        for n in range(samples)
    ]
    model.eval()
    for start in range(0, len(rows), AT_ONCE):
        generate(model, rows[start : start + AT_ONCE], vocabulary)
    return rows


def _ended(row: Row, tokenizer: PreTrainedTokenizerFast) -> Ids:
    return [*row.ids, tokenizer.eos_token_id] if row.finish_reason == "stop" else row.ids


def _encoded(tokenizer: PreTrainedTokenizerFast, written: Sequence[Sequence[str]]) -> list[Ids]:
    bodies = encode_texts(tokenizer, list(chain.from_iterable(written)))
    return [[*body, tokenizer.eos_token_id] for body in bodies]


@torch.no_grad()
def reply_logprobs(model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]], temperature: float = 1.0) -> list[float]:
    """ln of the probability that a model at some temperature writes each (prompt, reply), in nats; ends count."""
    found: list[float] = []
    for start in range(0, len(pairs), AT_ONCE):
        part = pairs[start : start + AT_ONCE]
        batch = pad_right(part, model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logprobs = (logits[:, :-1].float() / temperature).log_softmax(-1)
        chosen = logprobs.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0]
        starts = torch.tensor([len(prompt) for prompt, _ in part], device=chosen.device)
        found += chosen.where(_is_reply(chosen, starts, batch["last"]), 0.0).sum(1).tolist()
    return found


def _is_reply(chosen: Tensor, starts: Tensor, last: Tensor) -> Tensor:
    """Which columns are predictions of reply tokens: column t predicts token t + 1."""
    places = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    return (places >= starts[:, None]) & (places <= last[:, None])


def matched_difference(student: Gauged, other: Gauged, seed: int = 0) -> Interval | None:
    """How much higher the first's validity at the teacher's lengths is; a paired bootstrap over prompts.

    None where one of the two, or too many of their resamples, do not cover the teacher's lengths.
    """
    first, second = student.matched().value, other.matched().value
    if first is None or second is None:
        return None
    prompts = len(student.valid)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES).astype(float)  # how often each prompt is
    differences = _matched(student, drawn) - _matched(other, drawn)
    known = differences[~np.isnan(differences)]
    if len(known) < 0.95 * RESAMPLES:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(first - second, float(low), float(high), prompts)


def _matched(side: Gauged, drawn: Floats, least: int = 5, coverage: float = 0.75) -> Floats:
    """`metrics.matched_mean` of many resamples at once: drawn (R, prompts) -> (R,), NaN where it is not known.

    The bins are those of all prompts.
    """
    edges = length_edges(list(chain.from_iterable(side.teacher_lengths)))

    def counts(lengths: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Floats:
        inside = [
            np.bincount(np.digitize(own, edges), None if weights is None else weights[n], len(edges) + 1)
            for n, own in enumerate(lengths)
        ]
        return drawn @ np.stack(inside)

    written, valid, theirs = counts(side.lengths), counts(side.lengths, side.valid), counts(side.teacher_lengths)
    share = theirs / theirs.sum(1, keepdims=True) * (written >= least)
    covered = share.sum(1)
    mean = (share * valid / np.maximum(written, 1)).sum(1) / np.maximum(covered, 1e-9)
    return np.where(covered >= coverage, mean, np.nan)
