"""Coding while learning: no token is charged under weights that have seen it, and learning pays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.known_sources import Independent, Markov
from luthier.entropy.prequential import Learning, cross_fit_nats, prequential_nats
from luthier.learn.objectives import CausalLoss

VOCAB, START = 8, 0
CPU = torch.device("cpu")
LEARNING = Learning(context=16, windows=8, learning_rate=1e-2, passes=2)


def objective() -> CausalLoss:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CausalLoss(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval(), plain_head=True)


def prequential(tokens: np.ndarray, learning: Learning = LEARNING) -> np.ndarray:
    return prequential_nats(objective(), tokens, start_token=START, learning=learning, device=CPU)


def chain(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    found = Markov(vocab_size=VOCAB, order=1, concentration=0.2).sample(1, length, seed)
    return found.tokens[0], found.surprisal[0]


def test_nothing_is_charged_under_weights_that_have_seen_it() -> None:
    """Blocks grow from one window to eight: a change in a block leaves all before that block as it was."""
    tokens, _ = chain(600)
    before = prequential(tokens)
    for place, unchanged in ((16, 16), (300, 300), (599, 599)):
        other = tokens.copy()
        other[place:] = (other[place:] + 1) % VOCAB
        after = prequential(other)
        np.testing.assert_array_equal(before[:unchanged], after[:unchanged])
        assert before[place] != after[place]


def test_the_first_block_is_that_of_the_model_as_it_was() -> None:
    tokens, _ = chain(64)
    model = objective().model
    seen = torch.tensor([[START, *tokens[:15]]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(seen).logits[0].double(), -1)
    expected = -log_p[torch.arange(16), torch.tensor(tokens[:16])]
    np.testing.assert_allclose(prequential(tokens)[:16], expected.numpy(), atol=1e-5)


def test_learning_lowers_the_cost_but_never_below_the_truth() -> None:
    tokens, truth = chain(3000)
    nats = prequential(tokens)
    late = slice(1500, None)
    assert nats[late].mean() < 0.75 * math.log(VOCAB)  # a model that cannot learn pays log 8 = 2.08
    excess = nats - truth
    assert excess.mean() > -3 * excess.std() / math.sqrt(len(excess))


def test_what_has_no_structure_stays_as_long_as_it_is() -> None:
    found = Independent(probabilities=(1 / VOCAB,) * VOCAB).sample(1, 1500, 0)
    assert prequential(found.tokens[0]).mean() > math.log(VOCAB)


def test_equal_seeds_give_equal_lengths() -> None:
    tokens, _ = chain(300)
    np.testing.assert_array_equal(prequential(tokens), prequential(tokens))


def cross_fit(pieces: list[np.ndarray], folds: int = 3, passes: int = 2) -> list[np.ndarray]:
    learning = Learning(context=16, windows=8, learning_rate=1e-2, passes=passes)
    return cross_fit_nats(objective, pieces, start_token=START, folds=folds, learning=learning, device=CPU)


def test_a_piece_is_scored_by_a_model_that_has_not_seen_it() -> None:
    pieces = [chain(100 + 10 * seed, seed)[0] for seed in range(6)]
    before = cross_fit(pieces)
    assert [len(nats) for nats in before] == [len(piece) for piece in pieces]
    last = pieces[4].copy()
    last[-1] = (last[-1] + 1) % VOCAB  # what comes last conditions nothing else in its piece
    after = cross_fit([*pieces[:4], last, pieces[5]])
    np.testing.assert_array_equal(before[4][:-1], after[4][:-1])
    np.testing.assert_array_equal(before[1], after[1])  # of the same fold, 4 % 3 = 1 % 3
    assert (before[0] != after[0]).any()  # whose model did see it


def test_cross_fitting_helps_where_pieces_are_alike() -> None:
    pieces = [chain(200, seed)[0] for seed in range(6)]
    few, many = (np.concatenate(cross_fit(pieces, folds=2, passes=passes)).mean() for passes in (1, 8))
    assert many < few - 0.1
    with pytest.raises(ValueError, match="folds: got 7, expected 2 to 6"):
        cross_fit(pieces, folds=7)
