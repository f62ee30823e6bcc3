"""The second-order heads: what each has seen, and that it learns what it is named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.data.known_sources import KnownSample, Markov
from luthier.entropy.second_order import SecondOrderModel, fit, llama_trunk, squared_error_sum

LENGTH = 16


def make(seed: int = 0, vocab_size: int = 6, width: int = 32) -> SecondOrderModel:
    torch.manual_seed(seed)
    return SecondOrderModel(llama_trunk(width=width, layers=1, heads=2, window=LENGTH), vocab_size)


def test_the_surprisal_head_sees_the_token_and_the_entropy_head_does_not() -> None:
    model = make().eval()
    ids = torch.randint(6, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 7] = (other[0, 7] + 1) % 6
    with torch.no_grad():
        before, after = model(ids), model(other)
    moved = [((a - b).abs()[0] > 1e-7).tolist() for a, b in zip(before, after, strict=True)]
    assert moved[0] == [place >= 7 for place in range(LENGTH)]
    assert moved[1] == [place >= 8 for place in range(LENGTH)]


def correlation(found: Tensor, truth: np.ndarray) -> float:
    return float(np.corrcoef(found.numpy().ravel(), truth.ravel())[0, 1])


@pytest.fixture(scope="module")
def learned() -> tuple[SecondOrderModel, KnownSample]:
    """Heads trained on realized surprisals of a chain, and segments that they have not seen."""
    source = Markov(vocab_size=6, order=1, concentration=0.3)
    sample = source.sample(512, LENGTH, seed=0)
    model = make()
    ids, targets = torch.tensor(sample.tokens), torch.tensor(sample.surprisal, dtype=torch.float32)
    losses = fit(model, ids, targets, steps=150, learning_rate=5e-3)
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    return model, source.sample(200, LENGTH, seed=1)


def test_each_head_learns_its_own_quantity_from_the_same_targets(
    learned: tuple[SecondOrderModel, KnownSample],
) -> None:
    model, sample = learned
    with torch.no_grad():
        found = model(torch.tensor(sample.tokens))
    assert correlation(found.surprisal, sample.surprisal) > 0.85
    assert correlation(found.entropy, sample.entropy) > 0.9  # though it never saw an entropy
    assert correlation(found.entropy, sample.surprisal) < 0.75  # what came cannot be known beforehand
    assert float(found.entropy.mean()) == pytest.approx(sample.entropy.mean(), abs=0.05)


def test_equal_seeds_give_equal_heads() -> None:
    ids, targets = torch.arange(48).view(4, 12) % 6, torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    first, second = (fit(make(), ids, targets, steps=3, batch_size=2, seed=5) for _ in range(2))
    assert first == second
    assert fit(make(), ids, targets, steps=3, batch_size=2, seed=6) != first


def test_padding_costs_nothing_and_shapes_must_agree() -> None:
    model, ids, targets = make(), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)
    with torch.no_grad():
        found = model(ids)
    assert squared_error_sum(found, targets, torch.zeros(2, 4)) == 0
    expected = ((found.surprisal - 1) ** 2 + (found.entropy - 1) ** 2)[:, :2].sum()
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2)
    torch.testing.assert_close(squared_error_sum(found, targets, mask), expected)
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        fit(model, ids, targets[:, :3], steps=1)
