"""Batched generation with a key-value cache: any Hugging Face causal language model, any mix of requests.

Prompts are padded on the left; the attention mask hides the padding and position_ids count without it, so a row gets
the logits that it would get alone (up to the rounding of batched matrix products). Equal prompts are read once. A row
that is done leaves the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from luthier.core.errors import EndpointError
from luthier.llm.sampling import next_tokens
from luthier.llm.types import FinishReason, TokenLogprob

STATE_NAMES = ("cache", "past_key_values")  # what models call their cache, the second until transformers 5.24
REPLACEMENT = "\ufffd"  # what decoding makes of an unfinished character


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What generation must know of a tokenizer."""

    size: int
    """Ids from here on are padding rows of the embedding, and are never drawn."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    decode: Callable[[Sequence[int]], str]


@dataclass(kw_only=True)
class Row:
    """One answer in the making."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int
    top_logprobs: int | None
    """None: no log-probabilities are kept."""
    cancelled: Callable[[], bool] = lambda: False
    on_text: Callable[[str], None] | None = None
    """Called with each new piece of text, as soon as it cannot change any more."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    sampled: int = 0
    """Tokens sampled, the end token included."""
    text: str = ""
    finish_reason: FinishReason | None = None
    shown: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        # A stop string of b bytes spans at most b tokens; a few more for tokens that decode to nothing.
        self._stop_window = max((len(stop.encode()) for stop in self.stop), default=0) + 8

    def uniform(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def accept(self, token: int, logprob: TokenLogprob | None, vocabulary: Vocabulary) -> None:
        """Append a sampled token and see whether the answer is over."""
        self.sampled += 1
        if token in vocabulary.end_ids:
            self._finish("stop", self._decoded(vocabulary))
            return
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.stop and self._cut_at_stop(vocabulary):
            return
        if len(self.ids) >= self.max_tokens:
            self._finish("length", self._decoded(vocabulary))
        elif self.on_text is not None:
            text = self._decoded(vocabulary)
            self._show(text[: len(text) - unsettled(text, self.stop)])

    def _decoded(self, vocabulary: Vocabulary, count: int | None = None) -> str:
        """Text of the first `count` tokens, decoded after the prompt's last one: some tokenizers drop a text's first
        space."""
        ids, anchor = self.ids[:count], self.prompt[-1:]
        text, start = vocabulary.decode(anchor + ids), vocabulary.decode(anchor)
        return text[len(start) :] if text.startswith(start) else vocabulary.decode(ids)

    def _cut_at_stop(self, vocabulary: Vocabulary) -> bool:
        tail = vocabulary.decode((self.prompt[-1:] + self.ids)[-self._stop_window :])
        if not any(stop in tail for stop in self.stop):
            return False
        text = self._decoded(vocabulary)
        cuts = [position for stop in self.stop if (position := text.find(stop)) >= 0]
        if not cuts:
            return False
        while self.ids and len(self._decoded(vocabulary, len(self.ids) - 1)) >= min(cuts):
            del self.ids[-1:], self.logprobs[-1:]
        self._finish("stop", text[: min(cuts)])
        return True

    def _finish(self, reason: FinishReason, text: str) -> None:
        self.finish_reason, self.text = reason, text
        if self.on_text is not None:
            self._show(text)

    def _show(self, text: str) -> None:
        if self.on_text is not None and len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)


def unsettled(text: str, stop: Sequence[str]) -> int:
    """How many last characters may still change: an unfinished character, or the beginning of a stop string."""
    if text.endswith(REPLACEMENT):
        return len(text) - len(text.rstrip(REPLACEMENT))
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)


@torch.no_grad()  # not inference_mode: rotary buffers that a forward pass makes must stay usable in training
def generate(model: PreTrainedModel, rows: Sequence[Row], vocabulary: Vocabulary) -> None:
    """Write all answers, into the rows. Rows that are cancelled on the way are left unfinished."""
    batch = _Batch(model, list(rows))
    while batch.rows:
        tokens = _pick(batch.logits, batch.rows, vocabulary)
        alive = [i for i, row in enumerate(batch.rows) if row.finish_reason is None and not row.cancelled()]
        batch.keep(alive)
        if alive:
            batch.advance([tokens[i] for i in alive])


def _pick(logits: Tensor, rows: Sequence[Row], vocabulary: Vocabulary) -> list[int]:
    """Sample the next token of every row from logits [B, V] and hand it to the row."""
    if bool(logits.isnan().any()):
        raise EndpointError("the model computes NaN logits", hint="its weights or its number format are broken")
    if logits.device.type == "mps":  # it has no float64, in which tokens are drawn
        logits = logits.cpu()
    allowed = logits.clone()
    allowed[:, vocabulary.size :] = -torch.inf

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    chosen = next_tokens(
        allowed,
        column([row.temperature for row in rows], torch.float32),
        column([row.top_k for row in rows], torch.int64),
        column([row.top_p for row in rows], torch.float32),
        column([row.uniform() for row in rows], torch.float64),
    )
    tokens: list[int] = chosen.tolist()
    wanted = [row.top_logprobs for row in rows]
    for row, token, logprob in zip(rows, tokens, _logprobs(logits, chosen, wanted, vocabulary), strict=True):
        row.accept(token, logprob, vocabulary)
    return tokens


def _logprobs(
    logits: Tensor, chosen: Tensor, wanted: Sequence[int | None], vocabulary: Vocabulary
) -> list[TokenLogprob | None]:
    """Log-probabilities of the chosen ids [B] under logits [B, V]: the model's own, nothing masked."""
    if all(top is None for top in wanted):
        return [None] * len(wanted)
    table = logits.log_softmax(dim=-1)
    values = table.gather(1, chosen[:, None])[:, 0].tolist()
    best = table.topk(min(max(top or 0 for top in wanted), vocabulary.size), dim=-1)
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        None if top is None else token_logprob(token, value, vocabulary, list(zip(*others, strict=True))[:top])
        for top, token, value, others in zip(wanted, chosen.tolist(), values, alternatives, strict=True)
    ]


def token_logprob(
    token: int, logprob: float, vocabulary: Vocabulary, others: Sequence[tuple[int, float]] = ()
) -> TokenLogprob:
    """A token id with its log-probability (nats) in the terms of `llm.types`."""
    top = tuple((vocabulary.decode([other]), value) for other, value in others)
    return TokenLogprob(token=vocabulary.decode([token]), logprob=logprob, token_id=token, top=top)


@torch.no_grad()
def score(
    model: PreTrainedModel, texts: Sequence[tuple[list[int], int]], vocab_size: int
) -> list[tuple[list[float], bool]]:
    """Log-probabilities (nats) of ids[start:] for each (ids, start >= 1), in one forward pass, and whether greedy
    decoding, which draws from the first `vocab_size` ids only, would write just these."""
    keep = max(len(ids) - start for ids, start in texts) + 1
    logits = _read(model, [ids for ids, _ in texts], keep)[0]
    scores = []
    for row, (ids, start) in enumerate(texts):
        target = torch.tensor(ids[start:], device=logits.device)
        predictions = logits[row, -len(target) - 1 : -1].log_softmax(dim=-1)  # row p predicts what follows position p
        greedy = bool((predictions[:, :vocab_size].argmax(dim=-1) == target).all())
        scores.append((predictions.gather(1, target[:, None])[:, 0].tolist(), greedy))
    return scores


class _Batch:
    """The rows that are still being written, and the model's state after what they have so far."""

    def __init__(self, model: PreTrainedModel, rows: list[Row]) -> None:
        self.model, self.rows = model, rows
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
        logits, self.cache, self.mask = _read(model, [list(prompt) for prompt in prompts], 1)
        self.logits = logits[:, -1]
        self._select([prompts.index(tuple(row.prompt)) for row in rows])

    def keep(self, indices: list[int]) -> None:
        """Drop all other rows."""
        if len(indices) < len(self.rows):
            self.rows = [self.rows[i] for i in indices]
            self._select(indices)

    def advance(self, tokens: list[int]) -> None:
        """Append one token to every row and compute the next logits."""
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.logits = _forward(self.model, ids, self.mask, self.cache, 1)[:, -1]

    def _select(self, indices: list[int]) -> None:
        if indices == list(range(len(self.mask))):
            return
        chosen: Any = torch.tensor(indices, dtype=torch.int64, device=self.mask.device)
        self.logits, self.mask = self.logits[chosen], self.mask[chosen]
        self.cache.reorder_cache(chosen)  # unlike batch_select_indices, also for the states of linear attention


def _read(model: PreTrainedModel, prompts: Sequence[list[int]], keep: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Left-pad and read prompts: logits [B, keep, V] of the last positions, the cache, the mask [B, T]."""
    longest = max(map(len, prompts))
    device = next(model.get_input_embeddings().parameters()).device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    return _forward(model, ids, mask, cache, keep), cache, mask


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int) -> Tensor:
    """Float32 logits [B, keep, V] after ids [B, T]; mask [B, all positions so far] is 0 on padding."""
    adapted: Any = model
    inner = adapted.get_base_model() if hasattr(model, "get_base_model") else model  # adapters hide the signature
    parameters = inspect.signature(inner.forward).parameters
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    optional = {"position_ids": positions, "logits_to_keep": keep}
    chosen = {name: value for name, value in optional.items() if name in parameters}
    state = next((name for name in STATE_NAMES if name in parameters), None)
    if state is None or "attention_mask" not in parameters:
        raise EndpointError(
            f"{type(inner).__name__} keeps its state in a way of its own, which cannot be batched here",
            hint="serve it, and give the server's --endpoint instead",
        )
    if "position_ids" not in parameters and ids.shape[1] == 1:
        chosen["attention_mask"] = None  # Mamba takes a mask of the new tokens, and a single one is never padding
    output = model(input_ids=ids, use_cache=True, **{"attention_mask": mask, state: cache, **chosen})
    return output.logits[:, -keep:].float()
