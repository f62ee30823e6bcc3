from __future__ import annotations

import pytest
import torch

from luthier.distill.toy import (
    ToySettings,
    best_student,
    divergence,
    student_log_probabilities,
    teacher_probabilities,
    train_toy,
)

NARROW, WIDE = [(2.0, 1.0), (1.0, 1.0), (3.0, 0.5)], [(4.5, 3.0)]


def test_the_best_students_are_one_mode_or_everything():
    mean, width, oracle = best_student(reverse=True)
    assert (mean, width) == (pytest.approx(2, abs=0.05), pytest.approx(0.7, abs=0.02))
    assert oracle == pytest.approx(0.511, abs=0.001)  # about ln(1 / 0.6)
    mean, width, forward = best_student(reverse=False)
    assert forward == pytest.approx(0.53, abs=0.01)
    log_q = student_log_probabilities(torch.tensor([mean]), torch.tensor([width]).log())
    assert divergence(log_q, teacher_probabilities().log()).item() == pytest.approx(0.97, abs=0.01)
    assert log_q.exp()[0, 4:6].sum().item() == pytest.approx(0.25, abs=0.01)


@pytest.fixture(scope="module")
def trained():
    return train_toy(NARROW + WIDE, ToySettings(steps=700))


def test_near_a_mode_it_reaches_the_best_reverse_kl(trained):
    oracle = best_student(reverse=True)[2]
    assert (trained.reverse_kl[:3] < oracle + 0.03).all(), trained.reverse_kl


def test_from_a_wide_start_it_stays_wide(trained):
    assert trained.reverse_kl[3].item() == pytest.approx(0.965, abs=0.01)  # a local optimum
    assert trained.valley[3] > 0.2


def test_against_a_frozen_discriminator_it_collapses():
    frozen = train_toy(NARROW + WIDE, ToySettings(steps=700, frozen=True))
    uniform = (frozen.peak < 0.13) & (frozen.width > 4)
    assert ((frozen.peak > 0.95) | uniform).all(), frozen


def test_the_discriminator_ranks_classes_as_the_ratio_does():
    """Bradley-Terry's optimum: p(y) / q(y) = E_a sigma(D(y) - D(a)) / E_b sigma(D(b) - D(y)), which rises in D(y)."""
    settings = ToySettings(steps=0, warmup=600, discriminator_rate=0.03, prompts=256)
    scores = train_toy(WIDE, settings).scores[0]
    p = teacher_probabilities()
    q = student_log_probabilities(*(torch.tensor([x]) for x in (4.5, torch.tensor(3.0).log().item()))).exp()[0]
    margins = scores[:, None] - scores
    implied = (margins.sigmoid() @ p) / ((-margins).sigmoid() @ q)
    torch.testing.assert_close(implied.log(), (p / q).log(), rtol=0, atol=0.35)
    ratio, order = (p / q).log(), scores.argsort()
    assert (ratio[order].diff() > -0.1).all()  # in order, but for classes with nearly the same ratio


def test_draws_are_decided_by_the_seed():
    short = {"steps": 20, "warmup": 5}
    a, b, c = (train_toy(WIDE, ToySettings(seed=seed, **short)).mean for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
