from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from luthier.core.errors import ConfigError, DataError
from luthier.data.known_sources import Markov
from luthier.entropy.objectives import (
    OBJECTIVES,
    Objective,
    distil,
    lower_limit,
    min_max,
    objective,
    pack_labels,
    plain,
    trainer_loss,
    unpack_labels,
)
from luthier.learn.objectives import IGNORED

SETTINGS: dict[str, dict[str, float]] = {"flood": {"level": 1.5}, "iflood": {"level": 1.5}, "adaflood": {"gamma": 0.2}}


def losses() -> tuple[Tensor, Tensor, Tensor]:
    """Losses, targets and a mask (3, 7)."""
    generator = torch.Generator().manual_seed(0)
    nats, targets = (4 * torch.rand(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return nats.requires_grad_(), targets, torch.rand(3, 7, generator=generator) > 0.3


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("plain", lambda loss, e: loss),
        ("abs", lambda loss, e: abs(loss - e)),
        ("hinge", lambda loss, e: loss if loss > e else 0),
        ("soft-hinge", lambda loss, e: 0.1 * math.log1p(math.exp((loss - e) / 0.1))),
        ("drop", lambda loss, e: loss if e < 6 else 0),
        ("iflood", lambda loss, e: abs(loss - 1.5) + 1.5),
        (
            "adaflood",
            lambda loss, e: abs(loss + math.log(0.8 * math.exp(-e) + 0.2)) - math.log(0.8 * math.exp(-e) + 0.2),
        ),
    ],
)
def test_each_sum_is_what_its_equation_says(name: str, each: Callable[[float, float], float]) -> None:
    nats, targets, mask = losses()
    nats, targets = nats.detach(), targets * 2  # some targets are above the ceiling of 6
    total, tokens = objective(name, **SETTINGS.get(name, {}))(nats, targets, mask)
    rows = zip(nats.flatten().tolist(), targets.flatten().tolist(), mask.flatten().tolist(), strict=True)
    assert float(total) == pytest.approx(sum(each(loss, e) for loss, e, counted in rows if counted))
    assert int(tokens) == int(mask.sum())


def test_flood_is_of_the_mean_and_turns_around_below_the_level() -> None:
    nats, _, mask = losses()
    mean = float(nats[mask].mean().detach())
    for level, sign in ((mean - 0.1, 1), (mean + 0.1, -1)):
        total, tokens = objective("flood", level=level)(nats, None, mask)
        assert float(total.detach() / tokens) == pytest.approx(abs(mean - level) + level)
        (gradient,) = torch.autograd.grad(total, nats)
        torch.testing.assert_close(gradient, sign * mask.double())


def test_weights_go_from_one_to_zero_within_the_counted_tokens_of_each_row() -> None:
    nats, targets, mask = losses()
    a = min_max(targets, mask)
    assert a[mask].min() == 0
    assert a.amax(1).tolist() == [1, 1, 1]
    assert a[~mask].eq(0).all()
    total, _ = objective("weight")(nats.detach(), targets, mask)
    assert float(total) == pytest.approx(float(((1 - a) * nats.detach())[mask].sum()))
    assert min_max(torch.ones(2, 3)).eq(0).all()


def test_known_limits() -> None:
    """The factor 2.5, targets below zero, γ = 0 and 1, and τ → 0 are the objectives that they should be."""
    nats, targets, mask = losses()

    def slope(name: str, e: Tensor = targets, **chosen: float) -> Tensor:
        return torch.autograd.grad(objective(name, **chosen)(nats, e, mask).total, nats)[0]

    torch.testing.assert_close(slope("abs", scale=2.5), 2.5 * slope("abs"))
    torch.testing.assert_close(slope("abs", -targets), slope("plain"))
    torch.testing.assert_close(slope("hinge", -targets), slope("plain"))
    torch.testing.assert_close(slope("adaflood"), slope("abs"))
    torch.testing.assert_close(slope("adaflood", gamma=1.0), slope("plain"))
    torch.testing.assert_close(slope("soft-hinge", tau=1e-6), slope("hinge"))
    torch.testing.assert_close(lower_limit(targets, 0.5, k=2), targets - 1)
    torch.testing.assert_close(slope("hinge", below=1.0), slope("hinge", targets - 1))


def test_distillation_is_a_divergence_whose_gradient_is_that_of_the_teachers_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    logits.requires_grad_()
    total, tokens = distil(logits, teacher)
    expected = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert int(tokens) == 6
    assert float(distil(teacher, teacher + 3).total) == pytest.approx(0, abs=1e-5)
    cross = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (total, cross)))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "flood"])
def test_micro_batches_add_up(name: str) -> None:
    nats, targets, mask = losses()
    chosen = objective(name, **SETTINGS.get(name, {}))
    parts = [chosen(nats[row : row + 1], targets[row : row + 1], mask[row : row + 1]) for row in range(3)]
    whole = chosen(nats, targets, mask)
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(int(part.tokens) for part in parts) == int(whole.tokens)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_what_is_masked_changes_nothing(name: str) -> None:
    nats, targets, mask = losses()
    chosen = objective(name, **SETTINGS.get(name, {}))
    other = (nats.detach().where(mask, math.inf), targets.where(mask, -7.0))
    torch.testing.assert_close(chosen(*other, mask).total, chosen(nats.detach(), targets, mask).total)


# The fixed points (softmaxes over eight tokens, exact expectations: the mask holds the true probabilities).


def rest(chosen: Objective, p: Tensor, targets: Tensor) -> Tensor:
    """Where descent on E_p[loss] comes to rest in each row, from uniform; steps shrink, for gradients that jump."""
    logits = torch.zeros_like(p, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.5, 0.9))
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.988**step
        total, _ = chosen(-logits.log_softmax(-1), targets, p)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def truth(seeds: range = range(4)) -> tuple[Tensor, Tensor, Tensor]:
    """Distributions over eight tokens (4, 8), their surprisals and their entropies, in nats."""
    draws = [np.random.Generator(np.random.PCG64(seed)).dirichlet([2.0] * 8) for seed in seeds]
    p = torch.from_numpy(np.stack(draws))
    return p, -p.log(), -(p * p.log()).sum(-1, keepdim=True).expand_as(p)


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row in nats."""
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("name", ["abs", "hinge", "soft-hinge", "adaflood", "plain"])
def test_with_true_surprisals_the_model_comes_to_rest_at_the_truth(name: str) -> None:
    p, surprisal, _ = truth()
    assert divergences(p, rest(objective(name), p, surprisal)).max() < 1e-4


@pytest.mark.parametrize("name", ["abs", "hinge"])
def test_with_true_entropies_it_comes_to_rest_elsewhere_and_flatter(name: str) -> None:
    p, _, entropy = truth()
    q = rest(objective(name), p, entropy)
    assert divergences(p, q).min() > 0.01
    assert (-(q * q.log()).sum(-1) > entropy[:, 0]).all()


@pytest.mark.parametrize("name", ["abs", "hinge"])
def test_entropies_are_right_where_the_truth_is_uniform(name: str) -> None:
    p = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    assert divergences(p, rest(objective(name), p, -p.log())).max() < 1e-4


def test_weights_and_drops_rest_at_a_reweighted_truth() -> None:
    p, surprisal, _ = truth()
    for name, kept in (("drop", p * (surprisal < 2)), ("weight", p * (1 - min_max(surprisal)))):
        q = rest(objective(name, **({"ceiling": 2.0} if name == "drop" else {})), p, surprisal)
        torch.testing.assert_close(q, kept / kept.sum(-1, keepdim=True), atol=2e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_gradient_at_the_truth_vanishes_for_surprisals_only(seed: int) -> None:
    p, _, entropy = truth(range(seed, seed + 1))
    logits = p.log().requires_grad_()
    nats = -logits.log_softmax(-1)
    slopes = {
        (name, target): torch.autograd.grad(objective(name)(nats, e, p).total, logits, retain_graph=True)[0]
        for name in ("abs", "soft-hinge")
        for target, e in (("surprisal", nats.detach()), ("entropy", entropy))
    }
    assert slopes["abs", "surprisal"].abs().max() < 1e-12
    assert slopes["soft-hinge", "surprisal"].abs().max() < 1e-12
    assert slopes["abs", "entropy"].abs().max() > 1e-4


# The table of over-training in miniature (directions only; the whole is benchmarks/overtraining.py).


class Reader(nn.Module):
    """An MLP over the last four tokens: logits (B, T, V), row t for token t."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(9, 12), nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        seen = F.pad(tokens[:, :-1], (4, 0), value=8).unfold(1, 4, 1)
        logits: Tensor = self.mlp(self.embed(seen).flatten(2))
        return logits


def excesses(name: str, seed: int, steps: int = 350) -> tuple[float, float, float]:
    """(best, final) held-out loss above the truth and the final training loss, nats per token."""
    source = Markov(vocab_size=8, order=2, concentration=0.4, table_seed=seed)
    train, test = (source.sample(count, 32, seed=part) for part, count in enumerate((40, 80)))
    tokens, unseen = torch.from_numpy(train.tokens), torch.from_numpy(test.tokens)
    targets = torch.from_numpy(train.surprisal).float()
    level = {"level": float(targets.mean())} if name == "flood" else {}
    chosen, found = objective(name, **level), list[float]()
    torch.manual_seed(seed)
    network = Reader()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        rows = torch.randperm(40)[:10]
        nats = F.cross_entropy(network(tokens[rows]).transpose(1, 2), tokens[rows], reduction="none")
        total, count = chosen(nats, targets[rows], None)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        if step % 25 == 0:
            with torch.no_grad():
                held_out = F.cross_entropy(network(unseen).transpose(1, 2), unseen)
            found.append(float(held_out) - float(test.surprisal.mean()))
    return min(found), found[-1], float(nats.mean().detach())


@pytest.mark.parametrize("seed", range(3))
def test_over_training_hurts_cross_entropy_most_and_the_right_surprisals_least(seed: int) -> None:
    results = {name: excesses(name, seed) for name in ("plain", "flood", "abs")}
    best_plain, final_plain, memorized = results["plain"]
    assert results["abs"][1] < results["flood"][0] < best_plain < final_plain
    assert memorized < results["flood"][2]


# The Hugging Face Trainer.


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=16, **sizes))


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight rows of twelve tokens, of which a few are not learned, with labels that carry targets, or without."""

    def __init__(self, *, targets: bool = True) -> None:
        rng = np.random.Generator(np.random.PCG64(5))
        self.ids, self.targets = rng.integers(0, 20, (8, 12)), rng.uniform(-1, 5, (8, 12)).astype(np.float32)
        self.mask = rng.random((8, 12)) > 0.3
        labels = pack_labels(self.ids, self.targets, self.mask)
        self.labels = labels if targets else np.where(self.mask, self.ids, IGNORED)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[index].tolist(), "labels": self.labels[index].tolist()}


def make_trainer(folder: Path, loss: Callable[..., Tensor], batch: int, accumulate: int, **data: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=accumulate,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    return Trainer(small_model(), arguments, compute_loss_func=loss, **({"train_dataset": Rows()} | data))


def expected_loss(name: str, rows: Rows) -> float:
    """Our function on the whole batch, from the model's logits."""
    with torch.no_grad():
        logits = small_model()(torch.from_numpy(rows.ids)).logits[:, :-1]
    ids, targets = torch.from_numpy(rows.ids)[:, 1:], torch.from_numpy(rows.targets)[:, 1:]
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    total, tokens = objective(name, **SETTINGS.get(name, {}))(nats, targets, torch.from_numpy(rows.mask)[:, 1:])
    return float(total / tokens)


def first_loss(trainer: Trainer) -> float:
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize("name", ["abs", "hinge", "weight"])
def test_the_trainers_loss_is_ours_and_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    whole = make_trainer(tmp_path / "a", trainer_loss(name), 8, 1)
    parts = make_trainer(tmp_path / "b", trainer_loss(name), 1, 8)
    for trainer in (whole, parts):
        trainer.train()
        assert first_loss(trainer) == pytest.approx(expected_loss(name, Rows()), abs=2e-4)  # logs are rounded
    weights = [dict(trainer.model.named_parameters()) for trainer in (whole, parts)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)


def test_flood_floods_whole_batches_only(tmp_path: Path) -> None:
    loss = trainer_loss("flood", level=1.5)
    trainer = make_trainer(tmp_path / "a", loss, 8, 1, train_dataset=Rows(targets=False))
    trainer.train()
    assert first_loss(trainer) == pytest.approx(expected_loss("flood", Rows()), abs=2e-4)
    with pytest.raises(ConfigError, match=r"flood: got \d+ of the batch's \d+ targets at once, expected all"):
        make_trainer(tmp_path / "b", loss, 4, 2).train()


def test_evaluation_is_plain_cross_entropy_with_or_without_targets(tmp_path: Path) -> None:
    for rows in (Rows(), Rows(targets=False)):
        trainer = make_trainer(tmp_path, trainer_loss("hinge"), 8, 1, eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected_loss("plain", rows), abs=1e-4)


def test_labels_without_targets_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    rows = Rows(targets=False)
    with pytest.raises(DataError, match="hinge: labels without targets"):
        make_trainer(tmp_path, trainer_loss("hinge"), 8, 1, train_dataset=rows).train()


def test_targets_travel_inside_labels_bit_by_bit() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    ids = rng.integers(0, 2**31 - 200, (4, 50))
    targets = np.concatenate([rng.normal(0, 50, (4, 47)).astype(np.float32), [[0.0, -0.0, 1e-38]] * 4], 1)
    mask = rng.random((4, 50)) > 0.5
    found, e, present = unpack_labels(torch.from_numpy(pack_labels(ids, targets, mask)))
    counted = mask.copy()
    counted[:, 0] = False
    assert (found.numpy() == np.where(counted, ids, IGNORED)).all()
    assert (e.numpy()[counted] == targets.astype(np.float32)[counted]).all()
    assert (present.numpy() == counted).all()
    plainly = torch.tensor([[5, IGNORED, 7]])
    found, e, present = unpack_labels(plainly)
    assert torch.equal(found, plainly)
    assert not present.any()
    with pytest.raises(DataError, match="not finite"):
        pack_labels(np.array([1, 2]), np.array([1.0, math.inf]))
    with pytest.raises(DataError, match="targets for"):
        pack_labels(np.array([1, 2]), np.array([1.0]))


@pytest.mark.parametrize(
    ("name", "chosen", "told"),
    [
        ("hinges", {}, "objective: got 'hinges' .did you mean 'hinge'"),
        ("soft-hinge", {"taw": 1.0}, "no setting 'taw' .did you mean 'tau'"),
        ("hinge", {"tau": 1.0}, "objective hinge: no setting 'tau'"),
        ("flood", {}, "level: got nothing"),
        ("distil", {}, "distil needs the teacher's logits"),
        ("flood", {"level": 1.0, "below": 1.0}, "has no targets to lower"),
    ],
)
def test_wrong_objectives_are_named(name: str, chosen: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        objective(name, **chosen)


def test_the_loss_that_cancels_out_does_not_exist() -> None:
    """l - e has the gradient of l: whoever offers it offers cross-entropy under another name."""
    nats, targets, mask = losses()
    for name in set(OBJECTIVES) - {"plain", "flood"}:
        chosen = objective(name, **SETTINGS.get(name, {}))
        (slope,) = torch.autograd.grad(chosen(nats, targets * 3, mask).total, nats)
        (usual,) = torch.autograd.grad(plain(nats, None, mask).total, nats)
        assert not torch.allclose(slope, usual), name


def test_shapes_that_would_broadcast_are_refused() -> None:
    nats, targets, mask = losses()
    with pytest.raises(ValueError, match="targets: got shape"):
        objective("abs")(nats, targets[:1], mask)
    with pytest.raises(ValueError, match="mask: got shape"):
        plain(nats, None, mask[:1])
    with pytest.raises(ValueError, match="targets: got none"):
        objective("hinge")(nats, None, mask)
