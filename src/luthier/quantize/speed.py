"""Tokens per second of causal language models, one request at a time; models take turns, and so share bad moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.core.stats import Interval, bootstrap_median


class Speed(NamedTuple):
    """Tokens per second, medians with intervals over rounds: reading a prompt, and writing token by token.

    rounds: the rates of decoding by round.
    """

    prefill: Interval
    decode: Interval
    rounds: tuple[float, ...]

    def against(self, other: Speed) -> Interval:
        """How many times as fast as another model this one decodes, paired by round."""
        return bootstrap_median([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    advance: Callable[[int], None] = lambda rounds: None,
) -> dict[str, Speed]:
    """Speed of each model, greedy and with a batch of one.

    A round takes every model once; the first one only warms up and does not count. `advance` is told of each round.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            taken = _one_request(model, prompt_tokens, new_tokens)
            if number:
                seconds[name].append(taken)
        advance(1)
    return {name: _speed(taken, prompt_tokens, new_tokens) for name, taken in seconds.items()}


def _speed(taken: Sequence[tuple[float, float]], prompt_tokens: int, new_tokens: int) -> Speed:
    rounds = tuple(new_tokens / decode for _, decode in taken)
    return Speed(bootstrap_median([prompt_tokens / prefill for prefill, _ in taken]), bootstrap_median(rounds), rounds)


def _one_request(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to read a prompt, and to write the tokens after it."""
    network: Any = model
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(prompt_tokens, device=model.device) * 7919 % vocabulary)[None]
    began = _now(model)
    output = network(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = _best(output.logits)
    read = _now(model)
    for _ in range(new_tokens):
        output = network(input_ids=token, cache=output.cache, use_cache=True, logits_to_keep=1)
        token = _best(output.logits)
    return read - began, _now(model) - read


def _best(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
