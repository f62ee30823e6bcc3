"""Targets of `objectives.py`: what each token of a corpus costs a model that has not seen the token's document.

Cross-fitting: the documents are dealt into K folds, K models are trained, each without one fold, and each scores the
fold that it has not seen. A target is the surprisal -ln q(x) of a token that came, or the entropy H(q) of what might
have come; only surprisals have the true distribution as their fixed point. Equal documents stay in one fold, because a
copy in another one would be memory.

A target folder holds, beside a shard folder (`luthier.data.shards`) and in the order of its tokens:

- `targets.bin`: float16 nats, one for each token of `tokens.bin`;
- `index.json`: format version, kind, folds, the models that made them, and SHA-256 of tokens, tokenizer and targets.

Departures from arXiv 2511.10618, whose published code takes its targets from models that were trained on a corpus that
contains the documents (and some 200 times more): that is `source: external` here, and is labeled as transfer.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from luthier.core.errors import DataError
from luthier.core.files import atomic_folder, read_json, sha256_file, write_json
from luthier.core.seeds import derive_seed
from luthier.data.files import missing_path
from luthier.data.shards import TokenShards

FORMAT_VERSION = 1
DTYPE: np.dtype[Any] = np.dtype("<f2")
TRANSFER = (
    "The targets come from a model that was trained on other, usually more, text: training toward them is transfer, "
    "akin to distillation. Compare with distilling that model."
)

Kind = Literal["surprisal", "entropy"]
Document = NDArray[np.int64]
Scorer = Callable[[Sequence[Document]], list[NDArray[np.float64]]]
"""Documents, token ids (n,) each with its EOS, -> nats (n,) of each; the first token is charged too."""
Fit = Callable[[int, Sequence[Document]], Scorer]
"""Which fold is left out, and the documents of all others -> a model of them."""


def deal(documents: Sequence[Document], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each document, 0 to folds - 1: about as many tokens in each, and equal documents together.

    Raises: DataError for fewer than two folds, or fewer different documents than folds.
    """
    if folds < 2:
        raise DataError(f"folds: got {folds}, expected at least 2", hint="5 is usual")
    copies = defaultdict[bytes, list[int]](list)
    for index, document in enumerate(documents):
        copies[document.tobytes()].append(index)
    if len(copies) < folds:
        raise DataError(
            f"{len(copies)} different documents cannot be dealt into {folds} folds",
            hint="give more documents (lines of <|endoftext|> divide a file), or fewer folds",
        )
    salt = derive_seed(seed, "folds").to_bytes(8, "big")
    order = sorted(copies, key=lambda text: hashlib.sha256(salt + text).digest())
    order.sort(key=lambda text: len(text) * len(copies[text]), reverse=True)  # stable: equal sizes stay shuffled
    sizes, fold_of = [0] * folds, np.empty(len(documents), np.int64)
    for text in order:  # the largest first, each into the smallest fold
        smallest = min(range(folds), key=lambda fold: sizes[fold])
        sizes[smallest] += len(text) * len(copies[text])
        fold_of[copies[text]] = smallest
    return fold_of


def cross_fit(documents: Sequence[Document], fit: Fit, *, folds: int, seed: int) -> NDArray[np.float64]:
    """Nats of every token, document after document, each by the model that was fitted without its fold.

    Raises: DataError as `deal`, and when a model gives no finite number for a token.
    """
    fold_of = deal(documents, folds, seed)
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(documents)
    for fold in range(folds):
        scorer = fit(fold, [documents[index] for index in np.flatnonzero(fold_of != fold).tolist()])
        own = np.flatnonzero(fold_of == fold).tolist()
        for index, nats in zip(own, scorer([documents[index] for index in own]), strict=True):
            found[index] = nats
    return _checked(documents, found)


def score(documents: Sequence[Document], scorer: Scorer) -> NDArray[np.float64]:
    """Nats of every token, document after document, by one model for all. Raises: DataError as `cross_fit`."""
    return _checked(documents, scorer(documents))


def _checked(documents: Sequence[Document], found: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    if [len(nats) for nats in found] != [len(document) for document in documents]:
        raise DataError("a model gave other than one number for each token", hint="it must score every token once")
    nats = np.concatenate(found)
    fits = np.abs(nats) <= np.finfo(DTYPE).max
    if not fits.all():
        raise DataError(
            f"{int((~fits).sum())} of {len(nats)} targets are not finite",
            hint="the model rules out tokens that occur, or diverged: smooth it, or lower its learning rate",
        )
    return nats


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """Memory-mapped targets [num_tokens] in nats, float16, of token shards. Make one with write_targets or open."""

    values: NDArray[np.float16] = field(repr=False)
    kind: Kind
    source: Literal["cross-fit", "external"]
    folds: int
    """0 for an external model."""
    models: tuple[Mapping[str, Any], ...]
    """What made them: one entry for each fold, or the external model."""
    tokens_sha256: str
    tokenizer_sha256: str
    sha256: str
    """Of the targets themselves."""

    @classmethod
    def open(cls, folder: Path, shards: TokenShards) -> TokenTargets:
        """Map the targets of these tokens.

        Raises: DataError when a file is missing, truncated or changed, or when the targets were made for other tokens
        or another tokenizer.
        """
        if not folder.is_dir():
            raise missing_path(folder)
        index = read_json(folder / "index.json")
        if not isinstance(index, dict) or index.get("format") != FORMAT_VERSION:
            raise DataError(f"{folder}: no targets of format {FORMAT_VERSION}", hint="make them with luthier targets")
        for name, own in (("tokenizer", shards.tokenizer_sha256), ("tokens", shards.sha256)):
            if index[f"{name}_sha256"] != own:
                raise DataError(
                    f"{folder}: targets of {name} {index[f'{name}_sha256'] or 'unknown'}, but {shards.name} has {own}",
                    hint="make targets for these tokens with luthier targets",
                )
        path = folder / "targets.bin"
        if not path.exists() or path.stat().st_size != index["tokens"] * DTYPE.itemsize:
            raise DataError(f"{path}: missing or truncated", hint="make the targets again with luthier targets")
        if sha256_file(path) != index["targets_sha256"]:
            raise DataError(f"{path}: not the file that the index describes", hint="make the targets again")
        return cls(
            values=np.memmap(path, DTYPE, mode="r", shape=(index["tokens"],)),
            kind=index["kind"],
            source=index["source"],
            folds=index["folds"],
            models=tuple(index["models"]),
            tokens_sha256=index["tokens_sha256"],
            tokenizer_sha256=index["tokenizer_sha256"],
            sha256=index["targets_sha256"],
        )

    def window(self, index: int, length: int) -> NDArray[np.float32]:
        """Targets [length] in nats of the tokens that `TokenShards.window_targets` gives: those after each input."""
        return self.values[index * length + 1 : index * length + length + 1].astype(np.float32)


def write_targets(
    folder: Path,
    shards: TokenShards,
    nats: NDArray[np.float64],
    *,
    kind: Kind,
    folds: int,
    models: Sequence[Mapping[str, Any]],
) -> TokenTargets:
    """Write targets [num_tokens] beside their tokens; the folder appears whole or not at all, and replaces an old one.

    folds: 0 says that one external model made them. models: the provenance of each fold's model, or of that one.
    Raises: DataError when there is not one target for each token.
    """
    if len(nats) != shards.num_tokens:
        raise DataError(f"{len(nats)} targets for {shards.num_tokens} tokens", hint="score every token of the shards")
    with atomic_folder(folder) as partial:
        np.asarray(nats, DTYPE).tofile(partial / "targets.bin")
        source = "cross-fit" if folds else "external"
        index: dict[str, Any] = {"format": FORMAT_VERSION, "kind": kind, "unit": "nats", "tokens": len(nats)}
        index |= {"source": source, "folds": folds, "mean": float(nats.mean()), "models": list(models)}
        index |= {"tokens_sha256": shards.sha256, "tokenizer_sha256": shards.tokenizer_sha256}
        index |= {"targets_sha256": sha256_file(partial / "targets.bin")}
        write_json(partial / "index.json", index | ({} if folds else {"note": TRANSFER}))
    return TokenTargets.open(folder, shards)


class Counts:
    """An n-gram model by counting, without a network: the baseline that needs no training time.

    The context of `order` tokens, padded with the start token, is mixed with shorter ones by interpolated Witten-Bell
    smoothing: with n tokens of u kinds seen after a context, q = (count + u · q_shorter) / (n + u), down to uniform.
    """

    def __init__(self, documents: Sequence[Document], *, order: int, vocab_size: int, start: int) -> None:
        """order: tokens of context. start: the id that stands before a document."""
        self.order, self.vocab_size, self.start = order, vocab_size, start
        self._counts = [defaultdict[tuple[int, ...], dict[int, int]](dict) for _ in range(order + 1)]
        for document in documents:
            for context, token in self._places(document):
                for length in range(order + 1):
                    after = self._counts[length][context[self.order - length :]]
                    after[token] = after.get(token, 0) + 1

    def surprisal(self, documents: Sequence[Document]) -> list[NDArray[np.float64]]:
        """Nats (n,) of each token of each document."""
        return [
            -np.log([self._probability(context, token) for context, token in self._places(document)])
            for document in documents
        ]

    def entropy(self, documents: Sequence[Document]) -> list[NDArray[np.float64]]:
        """Nats (n,): entropy of what could have come in place of each token; V steps for each, so slow."""
        known: dict[tuple[int, ...], float] = {}
        return [
            np.array([self._entropy(context, known) for context, _ in self._places(document)]) for document in documents
        ]

    def _places(self, document: Document) -> list[tuple[tuple[int, ...], int]]:
        padded = [self.start] * self.order + document.tolist()
        return [(tuple(padded[i : i + self.order]), padded[i + self.order]) for i in range(len(document))]

    def _probability(self, context: tuple[int, ...], token: int) -> float:
        q = 1 / self.vocab_size
        for length in range(self.order + 1):
            after = self._counts[length].get(context[self.order - length :])
            if not after:
                return q  # longer contexts were not seen either
            q = (after.get(token, 0) + len(after) * q) / (sum(after.values()) + len(after))
        return q

    def _entropy(self, context: tuple[int, ...], known: dict[tuple[int, ...], float]) -> float:
        if context not in known:
            q = np.array([self._probability(context, token) for token in range(self.vocab_size)])
            known[context] = float(-(q * np.log(q)).sum())
        return known[context]


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    kind: Kind,
    start: Sequence[int],
    context: int,
    batch_size: int,
    advance: Callable[[float], object] = lambda tokens: None,
) -> list[NDArray[np.float64]]:
    """Nats (n,) of each token by a causal language model that sees the token's own document only.

    start: the ids that open a document; they are not scored. Windows of `context` input tokens advance by half, so
    that each token but the first ones has at least half a window before it. advance: told of tokens that are done.
    """
    found = [np.empty(len(document)) for document in documents]
    jobs = [job for number, ids in enumerate(documents) for job in _windows(number, len(ids) + len(start), context)]
    for first in range(0, len(jobs), batch_size):
        part = jobs[first : first + batch_size]
        rows = [np.concatenate([start, documents[number]])[begin : begin + context + 1] for number, begin, _ in part]
        batch = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)  # padding on the right: nobody sees it
        for line, row in zip(batch, rows, strict=True):
            line[: len(row)] = torch.from_numpy(row)
        batch = batch.to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        nats = _nats(logits, batch[:, 1:], kind).double().cpu().numpy()
        for row, values, (number, begin, seen) in zip(rows, nats, part, strict=True):
            skip = max(seen, len(start) - 1) if begin == 0 else seen
            place = begin + skip + 1 - len(start)
            scored = values[skip : len(row) - 1]
            found[number][place : place + len(scored)] = scored
            advance(len(scored))
    return found


def _windows(number: int, length: int, context: int) -> list[tuple[int, int, int]]:
    """(document, first token, predictions that an earlier window has made) of each window over `length` tokens."""
    stride = max(1, context // 2)
    starts = range(0, max(1, length - 1 - context + stride), stride)
    return [(number, begin, context - stride if begin else 0) for begin in starts]


def _nats(logits: torch.Tensor, tokens: torch.Tensor, kind: Kind) -> torch.Tensor:
    """(B, T) surprisal of the tokens, or entropy of the distributions, from logits (B, T, V)."""
    if kind == "surprisal":
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    log_q = logits.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)
