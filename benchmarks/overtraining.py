"""Does stopping at the entropy help? Held-out loss above the truth, while a small model trains far too long.

A Markov chain of order 2 over 8 tokens, whose surprisals are known; 300 segments of 64 tokens to train on, 1,500 steps
of 32 segments (160 passes), a transformer of width 64 with two layers. Each arm trains on another objective, or on
targets from another source, and is measured every 100 steps on 512 fresh segments: excess = its loss minus the true
surprisal, nats per token. The best step of each arm is chosen on those segments, as early stopping with a perfect
validation set would; the last one is what is left when nobody stops.

Where targets come from decides what an arm may be compared with:
  true      surprisals, entropies or distributions of the source itself: an oracle, which has the answer
  cross     two models, each trained on one half and stopped at its best step on the other half, which it scores
  external  one model trained on 256,000 other tokens of the source (13 times more data), stopped on yet others

    python benchmarks/overtraining.py [--seeds 0 1 2 3 4] [--out runs/overtraining]

Each seed is another chain, other data and other initial weights. Finished runs are kept in --out: the same command goes
on where it stopped, and appends one row to results/ when all are done; --record appends one with the seeds so far.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from record import record
from torch import Tensor, nn

from luthier.core.files import append_jsonl, read_jsonl
from luthier.core.seeds import derive_seed
from luthier.core.stats import bootstrap_mean, paired_difference
from luthier.data.known_sources import Markov
from luthier.entropy.objectives import LossSum, distil, objective, plain

LENGTH, VOCABULARY, ORDER = 64, 8, 2
TRAIN, TEST, EXTERNAL = 300, 512, 4000  # segments
BATCH, RATE, STEPS, EVERY = 32, 2e-3, 1500, 100
FOLD_STEPS, FOLD_EVERY = 600, 25  # of a cross-fitted model; its best step comes early


class Arm(NamedTuple):
    """One row: an objective and where its targets or its teacher come from."""

    name: str
    source: str = ""
    dropout: float = 0.0
    below: float = 0.0  # nats by which targets are lowered


ARMS: dict[str, Arm] = {
    "cross-entropy": Arm("plain"),
    "cross-entropy, dropout 0.2": Arm("plain", dropout=0.2),
    "label smoothing 0.1": Arm("distil", "smoothed"),
    "flooding at the true mean": Arm("flood"),
    "hinge, true surprisal": Arm("hinge", "true surprisal"),
    "abs, true surprisal": Arm("abs", "true surprisal"),
    "hinge, true entropy": Arm("hinge", "true entropy"),
    "abs, true entropy": Arm("abs", "true entropy"),
    "hinge, cross": Arm("hinge", "cross"),
    "hinge half a nat below, cross": Arm("hinge", "cross", below=0.5),
    "abs, cross": Arm("abs", "cross"),
    "drop top 10 %, cross": Arm("drop", "cross"),
    "distil, cross": Arm("distil", "cross"),
    "hinge, external": Arm("hinge", "external"),
    "abs, external": Arm("abs", "external"),
    "distil, external": Arm("distil", "external"),
    "distil, true distribution": Arm("distil", "true"),
}
COUNTS = "counts of order 2, no network"


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), rate)
        return x + F.dropout(self.mlp(self.norms[1](x)), rate)


class Network(nn.Module):
    """A causal transformer: tokens (B, T) -> logits (B, T, V), row t for token t, the first from an opening token."""

    def __init__(self, dropout: float = 0.0, width: int = 64, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY + 1, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        before = torch.cat([torch.full_like(tokens[:, :1], VOCABULARY), tokens[:, :-1]], 1)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(before) + self.places.weight)))
        return logits


def nats_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Loss of each token (B, T) in nats."""
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@torch.no_grad()
def logits_of(network: Network, tokens: Tensor) -> Tensor:
    """Logits of all segments (S, T, V), without dropout."""
    network.eval()
    logits = torch.cat([network(part) for part in tokens.split(64)])
    network.train()
    return logits


@dataclass(frozen=True, kw_only=True)
class Data:
    """Segments of one chain with the truth, and targets (S, T) in nats and teachers (S, T, V) for the training part."""

    train: Tensor
    test: Tensor
    test_surprisal: Tensor
    mean_surprisal: float
    targets: Mapping[str, Tensor]
    teachers: Mapping[str, Tensor]


Loss = Callable[[Tensor, Tensor, Tensor], LossSum]  # logits, tokens, which segments


def fit(
    tokens: Tensor,
    loss: Loss,
    look: Callable[[int, Network], None],
    seed: int,
    *,
    steps: int,
    every: int,
    dropout: float = 0.0,
) -> Network:
    """Train a network and look at it every few steps."""
    torch.manual_seed(seed)
    network = Network(dropout).to(tokens.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, fused=True)
    for step in range(1, steps + 1):
        picks = torch.randperm(len(tokens))[:BATCH].to(tokens.device)
        total, count = loss(network(tokens[picks]), tokens[picks], picks)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            look(step, network)
    return network


def cross_entropy(logits: Tensor, tokens: Tensor, picks: Tensor) -> LossSum:
    """Plain cross-entropy."""
    return plain(nats_of(logits, tokens))


def best_network(tokens: Tensor, validation: Tensor, seed: int, *, steps: int, every: int) -> Network:
    """A network trained by cross-entropy, as it was at its best step on the validation segments."""
    best, kept = float("inf"), dict[str, Tensor]()

    def look(step: int, network: Network) -> None:
        nonlocal best, kept
        found = float(nats_of(logits_of(network, validation), validation).mean())
        if found < best:
            best, kept = found, {name: value.clone() for name, value in network.state_dict().items()}

    network = fit(tokens, cross_entropy, look, seed, steps=steps, every=every)
    network.load_state_dict(kept)
    return network


def cross_fitted(tokens: Tensor, seed: int) -> Tensor:
    """Logits (S, T, V) of each segment by a network that was trained on the other half."""
    halves = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).chunk(2)
    logits = torch.empty(*tokens.shape, VOCABULARY, device=tokens.device)
    for own, other in (halves, halves[::-1]):
        start = derive_seed(seed, "fold", int(own[0]))
        network = best_network(tokens[other], tokens[own], start, steps=FOLD_STEPS, every=FOLD_EVERY)
        logits[own] = logits_of(network, tokens[own])
    return logits


def true_distribution(source: Markov, tokens: np.ndarray) -> np.ndarray:
    """ln p of every possible next token (S, T, V) by the source itself."""
    stationary, rows = source.table
    p = np.empty((*tokens.shape, VOCABULARY))
    context = np.zeros(len(tokens), np.int64)
    for place in range(tokens.shape[1]):
        nexts = rows
        if place < ORDER:
            nexts = stationary.reshape(VOCABULARY**place, VOCABULARY, -1).sum(2)
            nexts = nexts / nexts.sum(1, keepdims=True)
        p[:, place] = nexts[context]
        context = (context * VOCABULARY + tokens[:, place]) % VOCABULARY**ORDER
    return np.log(p)


def make_data(seed: int, cache: Path, device: str) -> Data:
    """The data of one seed. What the cross-fitted and the external networks say is kept in `cache`."""
    source = Markov(vocab_size=VOCABULARY, order=ORDER, concentration=0.4, table_seed=seed)
    sample = {n: source.sample(count, LENGTH, derive_seed(seed, n)) for n, count in (("train", TRAIN), ("test", TEST))}
    train, test = (torch.from_numpy(sample[name].tokens).to(device) for name in ("train", "test"))
    truth = {n: torch.from_numpy(getattr(sample["train"], n)).float().to(device) for n in ("surprisal", "entropy")}
    true = torch.from_numpy(true_distribution(source, sample["train"].tokens)).float().to(device)
    torch.testing.assert_close(nats_of(true, train), truth["surprisal"], rtol=1e-4, atol=1e-4)
    if not cache.exists():
        others, yet_others = (
            torch.from_numpy(source.sample(count, LENGTH, derive_seed(seed, name)).tokens).to(device)
            for name, count in (("external", EXTERNAL), ("external validation", TEST))
        )
        network = best_network(others, yet_others, derive_seed(seed, "external network"), steps=STEPS, every=EVERY)
        kept = {"cross": cross_fitted(train, derive_seed(seed, "cross")), "external": logits_of(network, train)}
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: logits.cpu() for name, logits in kept.items()}, cache)
    learned = {name: logits.to(device) for name, logits in torch.load(cache).items()}
    smoothed = torch.log(0.9 * F.one_hot(train, VOCABULARY) + 0.1 / VOCABULARY)
    return Data(
        train=train,
        test=test,
        test_surprisal=torch.from_numpy(sample["test"].surprisal).float().to(device),
        mean_surprisal=float(truth["surprisal"].mean()),
        targets={
            "true surprisal": truth["surprisal"],
            "true entropy": truth["entropy"],
            **{name: nats_of(logits, train) for name, logits in learned.items()},
        },
        teachers={"true": true, "smoothed": smoothed, **learned},
    )


def loss_of(arm: Arm, data: Data) -> Loss:
    """The loss of an arm on a batch."""
    if arm.name == "distil":
        teacher = data.teachers[arm.source]
        return lambda logits, tokens, picks: distil(logits, teacher[picks])
    settings = {"below": arm.below}
    if arm.name == "flood":
        settings["level"] = data.mean_surprisal
    if arm.name == "drop":
        settings["ceiling"] = float(data.targets[arm.source].quantile(0.9))
    chosen, targets = objective(arm.name, **settings), data.targets.get(arm.source)
    return lambda logits, tokens, picks: chosen(
        nats_of(logits, tokens), None if targets is None else targets[picks], None
    )


def run_arm(arm: Arm, data: Data, seed: int, steps: int) -> dict[str, Any]:
    """Train on one objective; its curve, best and final excess, and the training loss at the end, nats per token."""
    curve, began = list[tuple[int, float]](), time.perf_counter()

    def look(step: int, network: Network) -> None:
        nats = nats_of(logits_of(network, data.test), data.test)
        curve.append((step, float((nats - data.test_surprisal).mean())))

    start = derive_seed(seed, "student")
    network = fit(data.train, loss_of(arm, data), look, start, steps=steps, every=EVERY, dropout=arm.dropout)
    step, best = min(curve, key=lambda point: point[1])
    train_loss = float(nats_of(logits_of(network, data.train), data.train).mean())
    outcome = {"best": best, "best_step": step, "final": curve[-1][1], "train_loss": train_loss}
    if arm.source in data.targets:
        outcome |= _quality(data.targets[arm.source], data.targets["true surprisal"])
    return {**outcome, "seconds": round(time.perf_counter() - began, 1), "curve": [round(e, 4) for _, e in curve]}


def _quality(targets: Tensor, truth: Tensor) -> dict[str, float]:
    both = torch.stack([targets.flatten(), truth.flatten()])
    return {"target_mean": float(targets.mean()), "target_correlation": float(torch.corrcoef(both)[0, 1])}


def counting(data: Data) -> dict[str, Any]:
    """The excess of counted frequencies, each with 1/2 added (Krichevsky and Trofimov 1981)."""
    nats, losses = list[Tensor](), list[Tensor]()
    for place in range(LENGTH):
        known = min(place, ORDER)
        weights = VOCABULARY ** torch.arange(known - 1, -1, -1, device=data.train.device)

        def context(tokens: Tensor, first: int, last: int, w: Tensor = weights, k: int = known) -> Tensor:
            return (tokens.unfold(1, k, 1)[:, first - k : last - k] * w).sum(-1) if k else 0 * tokens[:, first:last]

        last = LENGTH if place >= ORDER else place + 1
        seen = context(data.train, known, last) * VOCABULARY + data.train[:, known:last]
        size = VOCABULARY ** (known + 1)
        table = (seen.flatten().bincount(minlength=size).view(-1, VOCABULARY) + 0.5).log()
        table = -table.log_softmax(1)
        for tokens, found in ((data.test, nats), (data.train, losses)):
            found.append(table[context(tokens, place, place + 1)[:, 0], tokens[:, place]])
    excess = float((torch.stack(nats, 1) - data.test_surprisal).mean())
    return {"best": excess, "best_step": 0, "final": excess, "train_loss": float(torch.stack(losses, 1).mean())}


def summarize(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per arm with intervals over the seeds, and its best excess against that of cross-entropy."""
    found = {(row["arm"], row["seed"]): row for row in rows}
    base = [found["cross-entropy", seed]["best"] for seed in seeds]
    summary = []
    for arm in [*ARMS, COUNTS]:
        own = [found[arm, seed] for seed in seeds]
        values = {key: [row[key] for row in own] for key in ("best", "final", "train_loss")}
        line = {
            "arm": arm,
            "best": bootstrap_mean(values["best"]).text(),
            "best_steps": [row["best_step"] for row in own],
            "final": bootstrap_mean(values["final"]).text(),
            "train_loss": round(float(np.mean(values["train_loss"])), 3),
            "best_minus_cross_entropy": paired_difference(values["best"], base).text(),
        }
        for key in ("target_mean", "target_correlation"):
            if key in own[0]:
                line[key] = round(float(np.mean([row[key] for row in own])), 3)
        summary.append(line)
    return summary


def finished(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[int]:
    """The seeds of which every arm is done."""
    done = {(row["arm"], row["seed"]) for row in rows}
    return [seed for seed in seeds if all((arm, seed) in done for arm in [*ARMS, COUNTS])]


def run_seed(seed: int, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Run what is missing of one seed, appending rows."""
    done = {row["arm"] for row in rows if row["seed"] == seed}
    missing = [arm for arm in [COUNTS, *ARMS] if arm not in done]
    if not missing:
        return
    data = make_data(seed, options.out / f"learned-{seed}.pt", options.device)
    for arm in missing:
        outcome = counting(data) if arm == COUNTS else run_arm(ARMS[arm], data, seed, options.steps)
        rows.append({"arm": arm, "seed": seed, "steps": options.steps, **outcome})
        append_jsonl(options.out / "rows.jsonl", rows[-1])
        print(f"seed {seed}, {arm}: best {outcome['best']:+.3f}, final {outcome['final']:+.3f}", flush=True)


def main() -> None:
    """Run the arms and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/overtraining"))
    parser.add_argument("--record", action="store_true", help="append a row with the seeds that are done, and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in read_jsonl(options.out / "rows.jsonl") if row["steps"] == options.steps]
    for seed in () if options.record else options.seeds:
        run_seed(seed, options, rows)
    seeds = finished(rows, options.seeds)
    if not seeds:
        raise SystemExit("no seed is finished: run without --record first")
    summary = summarize(rows, seeds)
    record("overtraining", device=options.device, steps=options.steps, seeds=seeds, rows=summary)
    for line in summary:
        print(*line.values(), sep=" | ")


if __name__ == "__main__":
    main()
