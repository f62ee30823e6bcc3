"""A bundle in training: what the layer computes with is what the file will hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.quantize.affine import encode, fake_quantize, grid
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.gptq import gptq, rotated_hessian
from luthier.quantize.layer import Bundle, Part
from luthier.quantize.rotation import rotate
from luthier.quantize.student import Student

BUNDLE = Bundle((Part("q.weight", (24, 64)), Part("k.weight", (8, 64))))
PAPER = {
    "scale_parameter": "linear",
    "scale_start": "ones",
    "start": "rtn",
    "weight_basis": "original",
    "pairing": "random",
}


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(model="m", **{"group_size": 32, "rounds": 4, **settings})


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(channels: int = 64) -> Tensor:
    x = sample(200, channels, seed=5) * (1 + 3 * torch.rand(channels, generator=torch.Generator().manual_seed(6)))
    x = x + x.roll(1, 1)
    return x.T @ x


def turned(student: Student, seed: int = 1) -> Student:
    """The same student as after some training of stage 1."""
    with torch.no_grad():
        student.theta.copy_(0.4 * sample(*student.theta.shape, seed=seed))
        student.alpha = (0.2 * sample(*student.scale.shape, seed=seed + 1)).exp()
    return student


def test_an_untrained_student_rounds_to_nearest() -> None:
    weight = sample(32, 64)
    made = Student(BUNDLE, weight, config(), seed=0).weights()
    grouped = weight.view(32, 2, 32)
    rounded = fake_quantize(grouped, *grid(grouped, 4), 4).view(32, 64)
    torch.testing.assert_close(torch.cat([made["q.weight"], made["k.weight"]]), rounded)


@pytest.mark.parametrize("settings", [{}, PAPER, {"start": "rtn"}, {"bits": 2}, {"rounds": 0}, {"bits": 8}])
@pytest.mark.parametrize("channels", [64, 44])
def test_the_file_holds_what_the_layer_computed_with(settings: dict[str, Any], channels: int) -> None:
    bundle = Bundle((Part("q.weight", (24, channels)), Part("k.weight", (8, channels))))
    student = turned(Student(bundle, sample(32, channels), config(**settings), seed=0))
    student.fix_transform(moments(channels) if student.config.start == "gptq" else None)
    with torch.no_grad():
        made, stored = student.weights(), student.export()
    assert set(stored) == {"q", "k"}
    for name, weight in stored.items():
        assert weight.in_features == channels
        assert weight.rounds == student.config.rounds
        found, wanted = weight.dequantized(), made[f"{name}.weight"]
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_both_bases_of_stage_two_start_from_the_same_weights() -> None:
    made = []
    for basis in ("original", "rotated"):
        student = turned(Student(BUNDLE, sample(32, 64), config(start="rtn", weight_basis=basis), seed=0))
        student.fix_transform()
        made.append(student.weights()["q.weight"])
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_stage_two_starts_from_the_codes_of_gptq() -> None:
    student = turned(Student(BUNDLE, sample(32, 64), config(), seed=0))
    plain = turned(Student(BUNDLE, sample(32, 64), config(start="rtn"), seed=0))
    student.fix_transform(moments())
    plain.fix_transform()
    assert student.fixed is not None
    rotated = rotate(sample(32, 64) * student.alpha, student.pairs, student.theta, group_size=32)
    step, zero = grid(rotated.view(32, 2, 32), 4)
    blocks = student.fixed / student.alpha.view(-1, 32, 1)
    codes, _, _ = gptq(rotated, rotated_hessian(moments(), blocks), bits=4, group_size=32, step=step, zero=zero)
    latent = student._latent()
    mine, _ = encode(latent, student._steps(), student.zero, 4)
    assert float((mine.view(32, 64) == codes).float().mean()) > 0.999
    errors = []
    for one in (student, plain):
        error = torch.cat(list(one.weights().values())) - sample(32, 64)
        errors.append(float(((error @ moments()) * error).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_scales_are_blind_to_outliers_that_a_neighbour_pushed_over() -> None:
    weight, hessian, push = sample(32, 64), moments(), torch.ones(64)
    push[[3, 40]] = 16.0
    students = [Student(BUNDLE, weight, config(), seed=0), Student(BUNDLE, weight * push, config(), seed=0)]
    for student, second in zip(students, (hessian, hessian / push / push[:, None]), strict=True):
        student.search_scales(second)
    plain, pushed = (torch.cat(list(student.weights().values())) for student in students)
    torch.testing.assert_close(pushed / push, plain, rtol=1e-3, atol=1e-4)


def test_searched_scales_beat_no_scales() -> None:
    weight, hessian = sample(32, 64), moments()
    weight[:, 7] *= 20
    student = Student(BUNDLE, weight, config(bits=3), seed=0)
    errors = []
    for search in (False, True):
        if search:
            student.search_scales(hessian)
        error = torch.cat(list(student.weights().values())) - weight
        errors.append(float(((error @ hessian) * error).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_the_gradient_through_matrices_is_that_through_the_rotation() -> None:
    """Stage 1, exact gradient: the dense form against plain autograd over the definition."""
    student = turned(Student(BUNDLE, sample(32, 64), config(scale_parameter="linear"), seed=0)).double()
    upstream = sample(32, 64, seed=9).double()
    for parameter in (student.theta, student.scale):
        parameter.requires_grad_(True)
    (torch.cat(list(student.weights().values())) * upstream).sum().backward()
    theta, scale = (
        student.theta.detach().clone().requires_grad_(True),
        student.scale.detach().clone().requires_grad_(True),
    )
    turn = {"pairs": student.pairs, "group_size": 32}
    grouped = rotate(student.weight * scale, theta=theta, **turn).view(32, 2, 32)  # type: ignore[arg-type]
    rounded = fake_quantize(grouped, *grid(grouped, 4), 4).view(32, 64)
    back = rotate(rounded, theta=theta, inverse=True, **turn) / scale  # type: ignore[arg-type]
    (back * upstream).sum().backward()
    torch.testing.assert_close(student.theta.grad, theta.grad)
    torch.testing.assert_close(student.scale.grad, scale.grad)


def test_the_published_gradient_has_the_same_forward_pass_and_another_gradient() -> None:
    found = []
    for gradient in ("exact", "reference"):
        student = turned(Student(BUNDLE, sample(32, 64), config(gradient=gradient), seed=0))
        student.theta.requires_grad_(True)
        made = torch.cat(list(student.weights().values()))
        (made * sample(32, 64, seed=9)).sum().backward()
        found.append((made.detach(), student.theta.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    exact, reference = found[0][1], found[1][1]
    assert exact is not None
    assert reference is not None
    assert float(torch.cosine_similarity(exact.flatten(), reference.flatten(), dim=0)) < 0.9


def test_fillers_never_turn() -> None:
    student = Student(BUNDLE, sample(32, 64), config(pairing="random", rounds=16), seed=0)
    assert not bool(student.active.all())
    turned(student).fix_transform(moments())
    assert not bool(student.theta[~student.active].any())
