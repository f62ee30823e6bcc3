"""What one model of `instella_effects.py` does with each question, document or pair: figures that can be compared.

Every function takes the folder of a seed's run and the name of a stage, and returns `Scores`: by item, a pair of
numbers whose sums over items make the figure (right answers and 1, nats and tokens, …). The same items of two stages
are pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.core.files import read_json, read_jsonl, write_json
from luthier.data.preferences import preference_rows
from luthier.data.tokenizer import encode_documents, load_tokenizer
from luthier.learn.evaluate import stream_nll
from luthier.learn.objectives import CausalLoss, has_plain_head
from luthier.learn.parallel import Ranks
from luthier.models.load import load_pretrained
from luthier.tasks.runner import Row, read_answers
from luthier.train.dpo import margins

Scores = dict[str, tuple[float, float]]
Score = Callable[[Path, str], Scores]
BATCH = 64
COMPLETE = re.compile(r"#### -?\d+\Z")  # a reply that gives its answer in the format, and ends there


def stage_folder(run: Path, stage: str) -> Path:
    """The folder of a stage, which carries a number."""
    (found,) = [folder for folder in run.glob(f"[0-9]*-{stage}") if folder.name.partition("-")[2] == stage]
    return found


def ratio(scores: Mapping[str, tuple[float, float]]) -> float:
    """The figure."""
    tops, bottoms = zip(*scores.values(), strict=True)
    return float(sum(tops) / sum(bottoms))


# Answers.


def answered(value: Callable[[Sequence[Row]], float], task: str, method: str, run: Path, stage: str) -> Scores:
    """A figure of the attempts at each problem of a task, by methods that begin with `method`."""
    attempts: dict[str, list[Row]] = {}
    for row in read_answers(stage_folder(run, stage) / "answers.jsonl").values():
        if row["task"] == task and row["method"].startswith(method):
            attempts.setdefault(f"{row['problem']} {row['sha256']}", []).append(row)
    return {problem: (value(rows), 1.0) for problem, rows in attempts.items()}


def _share(rows: Sequence[Row]) -> float:
    return fmean(row["status"] == "correct" for row in rows)


def _any(rows: Sequence[Row]) -> float:
    return float(any(row["status"] == "correct" for row in rows))


def _complete(rows: Sequence[Row]) -> float:
    return fmean(COMPLETE.search(row["text"]) is not None for row in rows)


def _worked(rows: Sequence[Row]) -> float:
    return fmean(" = " in row["text"] for row in rows)


def _length(rows: Sequence[Row]) -> float:
    return fmean(row["completion_tokens"] for row in rows)


def correct(task: str, method: str = "") -> Score:
    """Share of right answers; of repeated ones pass@1."""
    return partial(answered, _share, task, method)


def solved(task: str) -> Score:
    """Share of problems with a right answer among all samples: pass@k of k samples."""
    return partial(answered, _any, task, "")


def complete(task: str) -> Score:
    """Share of replies that give an answer in the format and stop there."""
    return partial(answered, _complete, task, "")


def worked(task: str) -> Score:
    """Share of replies that calculate before they answer."""
    return partial(answered, _worked, task, "")


def reply_tokens(task: str) -> Score:
    """Tokens of a reply."""
    return partial(answered, _length, task, "")


def needle_nats(length: int, run: Path, stage: str) -> Scores:
    """Nats per token of the facts in documents of a length; of documents beyond the model's context none."""
    rows = read_answers(stage_folder(run, stage) / "answers.jsonl").values()
    asked = [row for row in rows if row["method"] == f"length {length}" and row["tokens"]]
    return {f"{row['problem']} {row['sha256']}": (row["nats"], float(row["tokens"])) for row in asked}


# Measured here, and kept in the seed's folder.


def kept(name: str, measure: Callable[[], Any], run: Path, stage: str) -> Any:
    """What `measure` returns, measured once for a stage that has ended."""
    path = run / "measures" / f"{stage_folder(run, stage).name}-{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, measure())
    return read_json(path)


def opened(run: Path, stage: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model that a stage made."""
    folder = stage_folder(run, stage) / "model"
    return load_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)


def document_nats(file: str, run: Path, stage: str) -> Scores:
    """Nats and tokens of each document of a file of the recipe's data."""
    texts = [row["text"] for row in read_jsonl(stage_folder(run, "word-problems") / file)]

    def measure() -> dict[str, tuple[float, float]]:
        model, tokenizer = opened(run, stage)
        encoded = encode_documents(tokenizer, texts)
        starts = np.cumsum([0, *(len(ids) for ids in encoded[:-1])])
        context = model.config.max_position_embeddings
        nats = stream_nll(
            CausalLoss(model, plain_head=has_plain_head(model)),
            np.concatenate([np.asarray(ids, np.int64) for ids in encoded]),
            start_token=tokenizer.eos_token_id,
            context=context,
            stride=context // 2,
            batch_size=BATCH,
            who=Ranks(device=torch.device("cpu")),
        )
        sums = np.add.reduceat(nats, starts)
        return {str(n): (float(sums[n]), float(len(ids))) for n, ids in enumerate(encoded)}

    return {key: (top, bottom) for key, (top, bottom) in kept(f"nats-{file}", measure, run, stage).items()}


@torch.no_grad()
def reply_logprobs(model: PreTrainedModel, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
    """Summed log-probabilities [B] of replies after their prompts, in nats."""
    found = []
    for first in range(0, len(prompts), BATCH):
        pairs = list(zip(prompts[first : first + BATCH], replies[first : first + BATCH], strict=True))
        longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
        ids, counts = (torch.zeros(len(pairs), longest, dtype=torch.long) for _ in range(2))
        for row, (prompt, reply) in enumerate(pairs):
            ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            counts[row, len(prompt) : len(prompt) + len(reply)] = 1
        logits = model(input_ids=ids).logits[:, :-1].float()  # padding is on the right: nothing before it sees it
        logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found.append((logprobs * counts[:, 1:]).sum(1))
    return torch.cat(found)


def preferences(run: Path, stage: str) -> dict[str, list[list[float]]]:
    """Summed log-probabilities of both replies of each unseen pair, and their lengths: two lists of two numbers."""
    file = stage_folder(run, "word-problems") / "preferences-test.jsonl"

    def measure() -> dict[str, list[list[float]]]:
        model, tokenizer = opened(run, stage)
        rows, _ = preference_rows(tokenizer, read_jsonl(file), model.config.max_position_embeddings, str(file))
        prompts, sides = [row["prompt_ids"] for row in rows], [[r[f"{s}_ids"] for r in rows] for s in SIDES]
        return {
            "logprobs": torch.stack([reply_logprobs(model, prompts, side) for side in sides], 1).tolist(),
            "lengths": [[float(len(reply)) for reply in pair] for pair in zip(*sides, strict=True)],
        }

    found: dict[str, list[list[float]]] = kept("preferences", measure, run, stage)
    return found


SIDES = ("chosen", "rejected")


def preferred(contrast: str, start: str, loss: str, run: Path, stage: str) -> Scores:
    """Unseen pairs that moved the right way against the stage `start`: in the mean of tokens (norm), or in the sum."""
    rows = read_jsonl(stage_folder(run, "word-problems") / "preferences-test.jsonl")
    now, before = preferences(run, stage), preferences(run, start)
    figures = (now["logprobs"], before["logprobs"], now["lengths"])
    after, reference, lengths = (torch.tensor(figure) for figure in figures)
    margin = margins(after, reference, lengths, loss).tolist()
    both = enumerate(zip(rows, margin, strict=True))
    return {str(n): (float(moved > 0), 1.0) for n, (row, moved) in both if row["contrast"] == contrast}
