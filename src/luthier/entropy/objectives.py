"""Losses that stop at the entropy of a text instead of going on to zero: sums over tokens, in nats.

Every function takes the model's loss of each token l = -ln q(x), its estimate e, both (B, T) in nats, and a mask (B, T)
of which tokens count, and returns a sum with the number of tokens to divide it by. The mask may hold other weights than
0 and 1, such as probabilities. Evaluation is always plain cross-entropy, whatever was trained.

| name       | loss of a token          | source                                                           |
|------------|--------------------------|------------------------------------------------------------------|
| plain      | l                        |                                                                  |
| abs        | scale · abs(l - e)       | arXiv 2511.10618 (its code: scale 2.5)                           |
| hinge      | l · [l > e]              | arXiv 2511.10618                                                 |
| soft-hinge | τ softplus((l - e) / τ)  | ours: the hinge with a soft edge                                 |
| drop       | l · [e < ceiling]        | arXiv 2511.10618 (its code: ceiling 6)                           |
| weight     | (1 - a) · l              | arXiv 2511.10618; a is e, scaled to 0..1 in each row             |
| flood      | abs(mean l - b) + b      | Flooding, Ishida et al. 2020; one number for a whole batch       |
| iflood     | abs(l - b) + b           | iFlood, Xie et al. 2022                                          |
| adaflood   | abs(l - θ) + θ           | AdaFlood, Bae et al. 2024; θ is e, moved toward the label by γ   |
| distil     | KL(teacher ‖ q)          | Hinton et al. 2015; takes logits, not losses                     |

What e is decides everything. Let p be the true distribution of the next token. With its true surprisal, -ln p(x), abs
and hinge rest at q = p; with the true entropy H(p) they do not, unless p is uniform where it is not zero, and drive q
flatter than p. Estimates must come from a model that has not seen the token (`targets.py`): else e is memorized with
it, and the hinge never closes. Distilling that model says strictly more than its surprisals do.

Departures from the paper's code: its loss l - e is left out, because its gradient is that of l; the factor 2.5 is an
option; sums are divided by tokens over the whole batch, not within a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.errors import ConfigError, DataError, did_you_mean
from luthier.learn.objectives import IGNORED


class LossSum(NamedTuple):
    """A sum in nats with its gradient, and the tokens that it is over: all that the mask counts."""

    total: Tensor
    tokens: Tensor


Objective = Callable[[Tensor, Tensor | None, Tensor | None], LossSum]


def plain(nats: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> LossSum:
    """Σ l: cross-entropy. Rests at q = p. `targets` are not used."""
    return _sum(nats, mask)


def absolute(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None, *, scale: float = 1.0) -> LossSum:
    """Σ scale · |l - e|: each token is pulled to its target from both sides ("W3"; the paper's code: scale 2.5).

    Rests at q = p for e = -ln p. Where e is negative it is cross-entropy.
    """
    return _sum(scale * (nats - _given(targets, nats)).abs(), mask)


def hinge(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None) -> LossSum:
    """Σ l · [l > e]: cross-entropy until a token reaches its target, then nothing ("W4"). Rests at q = p for e = -ln p.

    The value jumps at l = e; the gradient is what counts.
    """
    return _sum(nats * (nats > _given(targets, nats)), mask)


def soft_hinge(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None, *, tau: float = 0.1) -> LossSum:
    """Σ τ softplus((l - e) / τ), τ in nats: the gradient of a token fades around its target over about τ.

    Rests at q = p for e = -ln p: there all tokens weigh 1/2. τ → 0 has the hinge's gradient.
    """
    return _sum(tau * F.softplus((nats - _given(targets, nats)) / tau), mask)


def drop(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None, *, ceiling: float = 6.0) -> LossSum:
    """Σ l · [e < ceiling], in nats: tokens that are estimated to be hard are left out ("W5"), but still divided by.

    Rests at p without the dropped tokens, renormalized: they lose all probability.
    """
    return _sum(nats * (_given(targets, nats) < ceiling), mask)


def weight(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None) -> LossSum:
    """Σ (1 - a) · l, where a is e scaled to 0..1 between the least and the largest of its row ("W1").

    Rests at q ∝ p (1 - a), which is p only where a does not depend on the token. The scale differs from row to row.
    """
    return _sum(nats * (1 - min_max(_given(targets, nats), mask)), mask)


def flood(
    nats: Tensor, targets: Tensor | None = None, mask: Tensor | None = None, *, level: float | None = None
) -> LossSum:
    """N · (|mean l - b| + b), b = `level` in nats: descends above the level, ascends below it (Ishida et al. 2020).

    Any q with that mean loss is at rest. One number belongs to one batch: it is no sum over tokens, so that a batch in
    several micro-batches is another loss. `targets` are not used.
    """
    total, tokens = _sum(nats, mask)
    b = _level(level)
    return LossSum((total / tokens - b).abs() * tokens + b * tokens, tokens)


def iflood(
    nats: Tensor, targets: Tensor | None = None, mask: Tensor | None = None, *, level: float | None = None
) -> LossSum:
    """Σ |l - b| + b, b = `level` in nats: abs with one target for all (Xie et al. 2022).

    Pulls every token to probability e^-b, so it rests at p only where p is uniform. `targets` are not used.
    """
    b = _level(level)
    return _sum((nats - b).abs() + b, mask)


def adaflood(nats: Tensor, targets: Tensor | None, mask: Tensor | None = None, *, gamma: float = 0.0) -> LossSum:
    """Σ |l - θ| + θ with θ = -ln((1 - γ) exp(-e) + γ) (Bae et al. 2024): abs whose targets are corrected.

    e is the loss of a model that was trained on other folds. γ moves what it says toward the label: at 1 the target is
    0, which is cross-entropy; at 0 it is abs, but for a constant.
    """
    theta = -torch.log((1 - gamma) * torch.exp(-_given(targets, nats)) + gamma)
    return _sum((nats - theta).abs() + theta, mask)


def distil(logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> LossSum:
    """Σ KL(teacher ‖ q) over tokens, in nats; logits (B, T, V) of both. Rests where q is the teacher."""
    student, teacher = (values.float().log_softmax(-1) for values in (logits, teacher_logits))
    return _sum((teacher.exp() * (teacher - student)).sum(-1), mask)


def lower_limit(targets: Tensor, spread: Tensor | float, k: float = 1.0) -> Tensor:
    """e - k · spread, a lower confidence limit of the estimates; all in nats.

    Too high a target stops learning early; too low a one only lets cross-entropy back in. `spread` is the standard
    error of each estimate (B, T) or of all, for example the standard deviation between several estimators.
    """
    return targets - k * spread


def min_max(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Values (B, T), scaled to 0..1 between the least and the largest counted one of each row; a constant row is 0."""
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask > 0
    low = values.where(counted, values.new_tensor(torch.inf)).amin(-1, keepdim=True)
    high = values.where(counted, values.new_tensor(-torch.inf)).amax(-1, keepdim=True)
    scaled = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    return scaled.where(counted, 0)


def _sum(each: Tensor, mask: Tensor | None) -> LossSum:
    if mask is None:
        return LossSum(each.sum(), each.new_tensor(each.numel()))
    if mask.shape != each.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(each.shape)}")
    counted = mask != 0
    return LossSum((each.where(counted, 0) * mask).sum(), mask.sum())


def _given(targets: Tensor | None, nats: Tensor) -> Tensor:
    if targets is None or targets.shape != nats.shape:
        got = "none" if targets is None else f"shape {tuple(targets.shape)}"
        raise ValueError(f"targets: got {got}, expected one for each of the losses {tuple(nats.shape)}")
    return targets


def _level(level: float | None) -> float:
    if level is None:
        raise ConfigError("level: got nothing, expected nats per token", hint="the best held-out loss is a first guess")
    return level


OBJECTIVES: dict[str, Callable[..., LossSum]] = {
    "plain": plain,
    "abs": absolute,
    "hinge": hinge,
    "soft-hinge": soft_hinge,
    "drop": drop,
    "weight": weight,
    "flood": flood,
    "iflood": iflood,
    "adaflood": adaflood,
}
WITHOUT_TARGETS = ("plain", "flood", "iflood")


def objective(name: str, *, below: float = 0.0, **settings: float) -> Objective:
    """The objective of that name with its settings fixed.

    below: nats by which every target is lowered first, a `lower_limit` for estimates that are known to be too high.
    Raises: ConfigError for an unknown name or setting.
    """
    if name == "distil":
        raise ConfigError(
            "distil needs the teacher's logits, not one target for each token",
            hint="call luthier.entropy.objectives.distil in a loop of your own",
        )
    if name not in OBJECTIVES:
        hint = f"one of {', '.join(OBJECTIVES)}"
        raise ConfigError(f"objective: got {name!r}{did_you_mean(name, OBJECTIVES)}", hint=hint)
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for setting in settings:
        if setting not in known:
            hint = f"its settings are {', '.join(known)}" if known else "leave it out"
            raise ConfigError(f"objective {name}: no setting {setting!r}{did_you_mean(setting, known)}", hint=hint)
    if "level" in known:
        _level(settings.get("level"))
    if below and name in WITHOUT_TARGETS:
        raise ConfigError(f"objective {name}: has no targets to lower", hint="leave out below")
    chosen = partial(OBJECTIVES[name], **settings)
    return partial(_lowered, chosen, below) if below else chosen


def _lowered(
    chosen: Objective, below: float, nats: Tensor, targets: Tensor | None, mask: Tensor | None = None
) -> LossSum:
    return chosen(nats, lower_limit(_given(targets, nats), below), mask)


# The Hugging Face Trainer hands a loss function the model's outputs and the labels, and nothing else of the batch. So a
# target travels inside its label: a label is an int64, of which a token id needs 31 bits and a float32 another 32. What
# is ignored stays exactly IGNORED, so that collators pad and the Trainer counts as ever.
HAS_TARGET = 1 << 31
ID_BITS = HAS_TARGET - 1


def pack_labels(
    ids: NDArray[np.integer], targets: NDArray[np.floating], mask: NDArray[Any] | None = None
) -> NDArray[np.int64]:
    """Labels for `trainer_loss`: token ids (..., T) with the target of each, nats, inside. mask: 0 is not learned.

    The first token of a row is ignored: a causal Hugging Face model does not predict it.
    Raises: DataError for shapes that differ, or targets that are not finite.
    """
    ids, targets = np.asarray(ids), np.asarray(targets, np.float32)
    if ids.shape != targets.shape:
        raise DataError(f"{targets.shape} targets for {ids.shape} tokens", hint="one target for each token is needed")
    if not np.isfinite(targets).all():
        raise DataError("targets: some are not finite", hint="a model that rules a token out gives no usable target")
    bits = np.ascontiguousarray(targets).view(np.uint32).astype(np.uint64) << np.uint64(32)
    packed = (bits | np.uint64(HAS_TARGET) | ids.astype(np.uint64)).view(np.int64)
    packed[..., 0] = IGNORED
    return packed if mask is None else np.where(np.asarray(mask) == 0, IGNORED, packed)


def unpack_labels(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 with IGNORED, targets fp32 nats, whether there is a target), each shaped like the labels.

    Ordinary labels come back as they are, without targets.
    """
    counted = labels != IGNORED
    present = counted & ((labels & HAS_TARGET) != 0)
    bits = (labels >> 32).to(torch.int32).view(torch.float32)
    return (labels & ID_BITS).where(counted, IGNORED), bits.where(present, 0), present


def trainer_loss(name: str, *, below: float = 0.0, **settings: float) -> Callable[..., Tensor]:
    """A `compute_loss_func` for the Hugging Face Trainer; give it the labels of `pack_labels`.

    In evaluation, that is without gradients, it is plain cross-entropy. Logits (B, T, V), labels (B, T); the sum over
    the micro-batch is divided by the targets of the whole batch.

    Raises: ConfigError as `objective`, and for flood of a part of a batch; DataError for labels without targets.
    """
    chosen = objective(name, below=below, **settings)

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        ids, targets, present = unpack_labels(labels[:, 1:])
        mask = ids != IGNORED
        logits = outputs["logits"][:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), ids, ignore_index=IGNORED, reduction="none")
        learning = torch.is_grad_enabled()
        if learning and name not in WITHOUT_TARGETS and not torch.equal(present, mask):
            raise DataError(f"{name}: labels without targets", hint="make the labels with pack_labels(ids, targets)")
        total, tokens = (chosen if learning else plain)(nats, targets, mask)
        divisor = tokens if num_items_in_batch is None else num_items_in_batch
        if learning and name == "flood":
            _whole_batch(int(tokens), int(torch.as_tensor(divisor).flatten()[0]))
        return total / divisor

    return compute_loss


def _whole_batch(got: int, expected: int) -> None:
    if got != expected:
        raise ConfigError(
            f"flood: got {got} of the batch's {expected} targets at once, expected all of them",
            hint="set gradient_accumulation_steps to 1 and use one process, or use iflood",
        )
