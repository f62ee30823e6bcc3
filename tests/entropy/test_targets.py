from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.core.errors import DataError
from luthier.data.known_sources import Markov
from luthier.data.shards import TokenShards, write_shards
from luthier.data.tokenizer import train_bpe
from luthier.entropy.targets import (
    Counts,
    Document,
    Scorer,
    TokenTargets,
    cross_fit,
    deal,
    score,
    score_documents,
    write_targets,
)

TEXTS = [f"The luthier planes the top of violin {number} until it rings, then taps it." for number in range(6)]


def random_documents(count: int, seed: int = 0) -> list[Document]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.integers(0, 50, rng.integers(5, 40)) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), folds=st.integers(2, 5))
def test_folds_are_even_and_keep_copies_together(seed: int, folds: int) -> None:
    documents = random_documents(30, seed)
    documents += [documents[3].copy(), documents[3].copy()]
    fold_of = deal(documents, folds, seed)
    assert len({int(fold_of[index]) for index in (3, 30, 31)}) == 1
    sizes = [sum(len(documents[i]) for i in np.flatnonzero(fold_of == fold)) for fold in range(folds)]
    assert max(sizes) - min(sizes) <= 3 * 40
    backwards = deal(documents[::-1], folds, seed)[::-1]
    assert (fold_of == backwards).all()


def test_another_seed_deals_otherwise_and_impossible_folds_are_refused() -> None:
    documents = [np.array([number, 1, 2]) for number in range(20)]
    assert (deal(documents, 4, 0) != deal(documents, 4, 1)).any()
    with pytest.raises(DataError, match="3 different documents cannot be dealt into 4 folds"):
        deal([*documents[:3], documents[0]], 4, 0)
    with pytest.raises(DataError, match="folds: got 1"):
        deal(documents, 1, 0)


def test_no_document_is_scored_by_a_model_that_has_seen_it() -> None:
    documents = random_documents(12)
    documents.append(documents[5].copy())

    def fit(fold: int, training: Sequence[Document]) -> Scorer:
        seen = {document.tobytes() for document in training}
        return lambda part: [np.full(len(d), 10.0 * (d.tobytes() in seen) + fold) for d in part]

    nats = cross_fit(documents, fit, folds=3, seed=1)
    fold_of = deal(documents, 3, 1)
    expected = [np.full(len(document), float(fold)) for document, fold in zip(documents, fold_of, strict=True)]
    assert (nats == np.concatenate(expected)).all()


def test_impossible_tokens_and_missing_numbers_are_refused() -> None:
    documents = random_documents(4)
    with pytest.raises(DataError, match=r"^1 of \d+ targets are not finite"):
        score(documents, lambda part: [np.where(np.arange(len(d)) + i == 0, np.inf, 1.0) for i, d in enumerate(part)])
    with pytest.raises(DataError, match="not finite"):
        score(documents, lambda part: [np.full(len(d), 1e6) for d in part])  # more than float16 holds
    with pytest.raises(DataError, match="other than one number for each token"):
        score(documents, lambda part: [np.ones(len(d) - 1) for d in part])


def test_counts_are_a_distribution_and_their_entropy_its_expectation() -> None:
    counts = Counts(random_documents(5), order=2, vocab_size=60, start=0)
    for opening in ([], [7], [7, 9], [7, 9, 11]):
        after = np.array([counts.surprisal([np.array([*opening, token])])[0][-1] for token in range(60)])
        assert np.exp(-after).sum() == pytest.approx(1)
        entropy = counts.entropy([np.array([*opening, 0])])[0][-1]
        assert entropy == pytest.approx(float((np.exp(-after) * after).sum()))


def test_cross_fitted_surprisals_do_not_fall_below_the_truth_but_memorized_ones_do() -> None:
    source = Markov(vocab_size=8, order=2, concentration=0.4, table_seed=0)
    sample = source.sample(60, 32, seed=0)
    documents, truth = list(sample.tokens), sample.surprisal.mean()

    def fit(fold: int, training: Sequence[Document]) -> Scorer:
        return Counts(training, order=3, vocab_size=8, start=8).surprisal

    out_of_fold = cross_fit(documents, fit, folds=4, seed=0)
    memorized = score(documents, fit(0, documents))
    assert memorized.mean() < truth - 0.1
    assert truth < out_of_fold.mean() < truth + 0.6
    assert np.corrcoef(out_of_fold, sample.surprisal.ravel())[0, 1] > 0.5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 280)


@pytest.fixture
def shards(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TokenShards:
    return write_shards(TEXTS, tokenizer, tmp_path / "shards", source="test")


def write(folder: Path, shards: TokenShards) -> TokenTargets:
    nats = np.linspace(0, 9, shards.num_tokens)
    return write_targets(folder, shards, nats, kind="surprisal", folds=2, models=[{"fold": 0}, {"fold": 1}])


def test_targets_lie_beside_their_tokens(tmp_path: Path, shards: TokenShards) -> None:
    targets = write(tmp_path / "t", shards)
    assert (tmp_path / "t" / "targets.bin").stat().st_size == 2 * shards.num_tokens
    assert isinstance(targets.values, np.memmap)
    assert (targets.kind, targets.source, targets.folds) == ("surprisal", "cross-fit", 2)
    assert targets.models == ({"fold": 0}, {"fold": 1})
    for index in range(shards.num_windows(7)):
        window = targets.window(index, 7)
        assert window.dtype == np.float32
        assert window == pytest.approx(np.linspace(0, 9, shards.num_tokens)[7 * index + 1 : 7 * index + 8], rel=1e-3)
        assert len(window) == len(shards.window_targets(index, 7))


def test_an_external_model_is_labeled_as_transfer(tmp_path: Path, shards: TokenShards) -> None:
    nats = np.ones(shards.num_tokens)
    targets = write_targets(tmp_path / "t", shards, nats, kind="entropy", folds=0, models=[{"model": "big"}])
    assert (targets.kind, targets.source) == ("entropy", "external")
    assert "transfer" in json.loads((tmp_path / "t" / "index.json").read_text())["note"]
    with pytest.raises(DataError, match="targets for"):
        write_targets(tmp_path / "t", shards, nats[1:], kind="entropy", folds=0, models=[])


def test_targets_of_other_tokens_are_refused(
    tmp_path: Path, shards: TokenShards, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "t", shards)
    other_text = write_shards([text.upper() for text in TEXTS], tokenizer, tmp_path / "other", source="other")
    with pytest.raises(DataError, match=f"targets of tokens {shards.sha256}, but other has {other_text.sha256}"):
        TokenTargets.open(tmp_path / "t", other_text)
    other_tokenizer = write_shards(TEXTS, train_bpe(TEXTS, 270), tmp_path / "again", source="again")
    with pytest.raises(DataError, match="targets of tokenizer"):
        TokenTargets.open(tmp_path / "t", other_tokenizer)


def test_damaged_targets_are_refused(tmp_path: Path, shards: TokenShards) -> None:
    write(tmp_path / "t", shards)
    file = tmp_path / "t" / "targets.bin"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-1])
    with pytest.raises(DataError, match="missing or truncated"):
        TokenTargets.open(tmp_path / "t", shards)
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="not the file that the index describes"):
        TokenTargets.open(tmp_path / "t", shards)
    (tmp_path / "t" / "index.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match="no targets of format 1"):
        TokenTargets.open(tmp_path / "t", shards)
    with pytest.raises(DataError, match="no such file or folder"):
        TokenTargets.open(tmp_path / "absent", shards)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=64, **sizes)).eval()


def by_hand(model: LlamaForCausalLM, seen: Sequence[int], token: int) -> tuple[float, float]:
    """Surprisal of a token after some others, and entropy of what might come, in nats."""
    with torch.no_grad():
        log_q = model(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)
    return -float(log_q[token]), float(-(log_q.exp() * log_q).sum())


@pytest.mark.parametrize("start", [[0], [5, 0]])
def test_scores_are_those_of_one_token_after_the_other(start: list[int]) -> None:
    """Whatever the batch; each token sees its own document only, and at least half a window of it."""
    model, documents, context = small_model(), random_documents(3), 12
    settings = {"start": start, "context": context}
    found = {
        (kind, size): score_documents(model, documents, kind=kind, batch_size=size, **settings)  # type: ignore[arg-type]
        for kind in ("surprisal", "entropy")
        for size in (1, 4)
    }
    for index, document in enumerate(documents):
        assert len(document) == len(found["surprisal", 1][index])
        row = [*start, *document.tolist()]
        for place in range(len(document)):
            end = place + len(start)  # of what the token may see
            window = 0 if end <= context else 6 * math.ceil((end - context) / 6)
            surprisal, entropy = by_hand(model, row[window:end], row[end])
            for size in (1, 4):
                assert found["surprisal", size][index][place] == pytest.approx(surprisal, abs=1e-4)
                assert found["entropy", size][index][place] == pytest.approx(entropy, abs=1e-4)
