from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.llm.sampling import draw, keep_top_k, keep_top_p, next_tokens

INF = float("inf")


def kept(logits: torch.Tensor) -> list[list[bool]]:
    return (logits > -INF).tolist()


def test_top_k_is_per_row_and_zero_is_off() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(4, 1)
    assert kept(keep_top_k(logits, torch.tensor([1, 2, 0, 9]))) == [
        [False, True, False],
        [False, True, True],
        [True, True, True],
        [True, True, True],
    ]


def test_top_p_is_the_smallest_set_with_that_mass() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log().repeat(5, 1)
    assert kept(keep_top_p(logits, torch.tensor([0.4, 0.6, 0.8, 1.0, 1e-9]))) == [
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
        [True, True, True, True],
        [False, True, False, False],
    ]


def test_draw_inverts_the_cumulated_distribution() -> None:
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_drawn_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(20_000, 1)
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = draw(probabilities, uniforms).bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, probabilities[0], atol=0.015, rtol=0)


def test_temperature_zero_is_greedy_whatever_the_filters_say() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9]])
    for uniform in (0.0, 0.5, 0.999):
        token = next_tokens(
            logits,
            torch.tensor([0.0]),
            torch.tensor([2]),
            torch.tensor([0.9]),
            torch.tensor([uniform], dtype=torch.float64),
        )
        assert token.tolist() == [1]


def test_tiny_temperature_does_not_overflow() -> None:
    arguments = (torch.tensor([1e-38]), torch.tensor([0]), torch.tensor([0.5]))
    logits = torch.tensor([[1.0, 30.0, 29.9]])
    assert next_tokens(logits, *arguments, torch.tensor([0.99], dtype=torch.float64)).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3), st.integers(0, 12), st.floats(0.05, 1), st.floats(0, 1 - 2**-53))
def test_a_row_draws_the_same_in_any_company(
    seed: int, temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 11, generator=generator) * 3
    logits[:, 9:] = -INF
    columns = [
        torch.tensor([temperature, 0.0, 1.0, 0.3]),
        torch.tensor([top_k, 3, 0, 1]),
        torch.tensor([top_p, 0.5, 1.0, 0.9]),
        torch.tensor([uniform, 0.1, 0.6, 0.9], dtype=torch.float64),
    ]
    together = next_tokens(logits, *columns)
    alone = [next_tokens(logits[i : i + 1], *(column[i : i + 1] for column in columns)).item() for i in range(4)]
    assert together.tolist() == alone
    assert (together < 9).all(), "tokens of probability zero are never drawn"
