from __future__ import annotations

import math

import pytest
import torch

from luthier.distill.objective import (
    bradley_terry,
    group_advantages,
    informative_groups,
    length_matched,
    length_residual,
    length_reward,
    next_discriminator_steps,
    pair_accuracy,
    token_advantages,
    token_moments,
)

OWNER = torch.tensor([0, 0, 1])


def test_the_loss_is_the_closed_form():
    student, teacher = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, -0.5])
    expected = sum(math.log1p(math.exp(s - t)) for s, t in [(0.5, 1.0), (-1.0, 1.0), (2.0, -0.5)])
    assert bradley_terry(student, teacher, OWNER).item() == pytest.approx(expected, rel=1e-6)


def test_a_teacher_scored_once_gets_the_gradient_of_one_scored_for_every_sample():
    student, teacher = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    once = torch.autograd.grad(bradley_terry(student, teacher, OWNER), [student, teacher])
    tiled = teacher[OWNER].detach().requires_grad_()
    each = torch.autograd.grad(bradley_terry(student, tiled, torch.arange(3)), [student, tiled])
    torch.testing.assert_close(once[0], each[0])
    torch.testing.assert_close(once[1], torch.zeros(2).index_add(0, OWNER, each[1]))


def test_learning_raises_the_teacher_and_lowers_the_student():
    student, teacher = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = bradley_terry(student, teacher, OWNER)
    slopes = torch.autograd.grad(loss, [student, teacher])
    assert (slopes[0] > 0).all()  # descent lowers what has a positive slope
    assert (slopes[1] < 0).all()


def test_extreme_margins_stay_finite():
    loss = bradley_terry(torch.tensor([1e4, -1e4, 0.0]), torch.tensor([0.0, 0.0]), OWNER)
    assert loss.item() == pytest.approx(1e4 + math.log(2), rel=1e-5)


def test_smoothing_mixes_both_orders_and_centering_adds_squares():
    student, teacher, owner = torch.tensor([0.3]), torch.tensor([1.1]), torch.tensor([0])
    right, wrong = bradley_terry(student, teacher, owner), bradley_terry(teacher, student, owner)
    torch.testing.assert_close(bradley_terry(student, teacher, owner, smoothing=0.1), 0.9 * right + 0.1 * wrong)
    torch.testing.assert_close(bradley_terry(student, teacher, owner, centering=0.5), right + 0.5 * 1.4**2)


def test_a_weight_of_zero_removes_a_pair():
    student, teacher = torch.randn(3), torch.randn(2)
    weighted = bradley_terry(student, teacher, OWNER, weights=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(weighted, bradley_terry(student[[0, 2]], teacher, OWNER[[0, 2]]))


def test_accuracy_counts_ties_as_halves():
    student, teacher = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0])
    assert pair_accuracy(student, teacher, OWNER).tolist() == [1.0, 0.5, 0.0]


def test_pairs_of_like_length():
    student, teacher = torch.tensor([10, 13, 5]), torch.tensor([10, 10])
    assert length_matched(student, teacher, OWNER, math.log(1.25)).tolist() == [1, 0, 0]
    assert length_reward(torch.tensor([10, 20]), torch.tensor([10, 10])).tolist() == pytest.approx([0, -math.log(2)])


def test_a_reward_made_of_length_alone_leaves_no_residual():
    lengths = torch.tensor([2, 4, 8, 16, 3, 5, 7, 11])
    groups = torch.tensor([1.0] * 4 + [-7.0] * 4)  # a prompt's own level is no length effect
    residual, explained = length_residual(0.7 * lengths.float().log() + groups, lengths, 4)
    assert explained.item() == pytest.approx(1, abs=1e-5)
    assert group_advantages(residual, 4, eps=1.0).abs().max() < 1e-5


def test_a_residual_has_no_length_left_in_it():
    torch.manual_seed(0)
    rewards, lengths = torch.randn(64), torch.randint(1, 30, (64,))
    residual, explained = length_residual(rewards, lengths, 8)
    assert 0 <= explained <= 1
    assert length_residual(residual, lengths, 8)[1] < 1e-6
    assert length_residual(rewards, torch.full((64,), 5), 8)[1] == 0
    assert torch.equal(length_residual(rewards, torch.full((64,), 5), 8)[0], rewards)


def test_advantages_sum_to_zero_and_have_unit_spread():
    torch.manual_seed(0)
    advantages = group_advantages(torch.randn(24) * 3 + 5, 8).view(3, 8)
    assert advantages.sum(1).abs().max() < 1e-5
    torch.testing.assert_close(advantages.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_groups_without_spread_are_found():
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0])
    assert informative_groups(rewards, 4, 1e-6).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("steps", "accuracy", "expected"), [(2, 0.5, 3), (2, 0.7, 2), (2, 0.9, 1), (1, 0.9, 1), (4, 0.5, 4)]
)
def test_a_lagging_discriminator_learns_more_often(steps, accuracy, expected):
    assert next_discriminator_steps(steps, accuracy, (0.6, 0.8), 4) == expected


def test_tokens_are_credited_against_all_tokens_of_their_group():
    rises = torch.tensor([[1.0, 3.0, 9.0], [2.0, 9.0, 9.0], [0.5, -0.5, 9.0], [4.0, 1.0, -2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    moments = token_moments(rises, mask)
    grouped = moments.view(2, 2, 3).sum(1).repeat_interleave(2, 0)
    found = token_advantages(rises, mask, grouped, eps=0.0)
    for rows in ([0, 1], [2, 3]):
        values = [float(v) for row in rows for v, counts in zip(rises[row], mask[row], strict=True) if counts]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        got = [float(v) for row in rows for v, counts in zip(found[row], mask[row], strict=True) if counts]
        assert got == pytest.approx([(v - mean) / spread for v in values], abs=1e-5)
    assert found[~mask].abs().max() == 0
