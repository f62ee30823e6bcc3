"""Entropy-estimation models on sources whose entropy is known exactly: where the loss lies, and where the code length.

    python benchmarks/entropy_sources.py                      # both parts, seed 0
    python benchmarks/entropy_sources.py --only demonstration --seeds 0 1 2

`demonstration`: a hidden class per segment, which a code could tell the decoder beforehand. The more bits the code has,
the further the decoder's loss falls below the true entropy, and the longer the whole code gets: the loss is no entropy.

`sources`: one network per source, with and without its code. Its code length should be within 2 % of the truth, and
never below it by more than three standard errors.

Every step trains on fresh segments. All lengths are in nats per token, with everything charged unless said otherwise;
intervals are bootstraps over held-out segments, paired with the truth about the same segments. Exit code 1 when a bound
is broken.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from luthier.core.config import build
from luthier.core.console import Console
from luthier.core.seeds import derive_seed
from luthier.core.stats import paired_difference
from luthier.data.known_sources import KNOWN_SOURCES, KnownSource
from luthier.entropy.code_length import CodeLength, Measured, check_bound, rows_as_documents
from luthier.entropy.config import TrainEemConfig
from luthier.entropy.training import build_model, train_eem
from luthier.learn.parallel import Ranks

LENGTH, BATCH = 32, 32
SHAPE = {"encoder_width": 32, "encoder_layers": 1, "decoder_width": 64, "decoder_layers": 2, "heads": 4}
# name: numbers in the code, share of the training segments without it
DEMONSTRATION = {
    "no code": (1, 1.0),
    "1 number of 4 bits": (1, 0.0),
    "4 numbers of 4 bits": (4, 0.0),
    "16 numbers of 4 bits": (16, 0.0),
}
SOURCES = {"iid": 200, "markov": 1250, "latent": 1000, "copy": 1250}  # steps


@dataclass
class Fresh:
    """New segments of a source at every step."""

    source: KnownSource
    seed: int

    def batch(self, step: int) -> Mapping[str, NDArray[np.int64]]:
        return {"input_ids": self.source.sample(BATCH, LENGTH, derive_seed(self.seed, "train", step)).tokens}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def trained(source: KnownSource, held_out: NDArray[np.int64], seed: int, **settings: Any) -> Measured:
    """What held-out segments cost under a model that was trained on fresh ones."""
    values: dict[str, Any] = {
        "window": LENGTH,
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "learning_rate": 3e-3,
        **SHAPE,
    }
    values |= {"seed": seed, "device": "cpu", "eval_every": 0, "checkpoint_every": 10**6, **settings}
    values["warmup_steps"] = min(50, values["steps"] // 4)
    config = build(TrainEemConfig, values)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train_eem(
            config,
            build_model(config, source.vocab_size),
            Fresh(source, seed),
            rows_as_documents(held_out),
            who=Ranks(),
            checkpoints=Path(folder),
            run=None,
            console=Console(err=io.StringIO()),
        )
    assert outcome.held_out is not None
    return outcome.held_out


def judged(length: CodeLength, truth: NDArray[np.float64]) -> dict[str, Any]:
    """Code length and its excess over the truth in nats per token, with 95 % intervals, and whether the bound holds."""
    charged = length.bits * math.log(2)
    excess = paired_difference((charged / LENGTH).tolist(), (truth / LENGTH).tolist(), resamples=2000)
    return {
        "code_length": round(length.nats_per_token, 4),
        "excess": [round(value, 4) for value in excess[:3]],
        "excess_percent": round(100 * excess.value / float(truth.mean() / LENGTH), 2),
        "bound_holds": check_bound(charged, truth).holds,
    }


def demonstration(seed: int, steps: int, segments: int) -> bool:
    """One row per size of the code; whether the bound held for all."""
    source, holds = KNOWN_SOURCES["latent"](), True
    sample = source.sample(segments, LENGTH, derive_seed(seed, "held out"))
    truth = sample.surprisal.sum(1)
    for name, (dims, null_share) in DEMONSTRATION.items():
        measured = trained(source, sample.tokens, seed, dims=dims, null_share=null_share, steps=steps)
        length = measured.null if null_share == 1 else measured.code
        loss = length.token_nats / LENGTH
        below = paired_difference(loss.tolist(), (truth / LENGTH).tolist(), resamples=2000)
        row = judged(length, truth)
        holds &= row["bound_holds"]
        record(
            "entropy_sources",
            claim="demonstration",
            code=name,
            code_nats_per_token=round(float(length.code_bits.mean()) * math.log(2) / LENGTH, 4),
            loss_given_the_code=round(float(loss.mean()), 4),
            loss_minus_truth=[round(value, 4) for value in below[:3]],
            **row,
            truth=round(float(truth.mean()) / LENGTH, 4),
            segments=segments,
            length=LENGTH,
            steps=steps,
            batch=BATCH,
            seed=seed,
        )
    return holds


def sources(seed: int, scale: float, segments: int) -> bool:
    """One row per source: without codes, with one of four bits for every segment, and the cheaper for each."""
    everywhere = True
    for name, steps in SOURCES.items():
        source = KNOWN_SOURCES[name]()
        sample = source.sample(segments, LENGTH, derive_seed(seed, "held out"))
        truth = sample.surprisal.sum(1)
        used = max(1, int(steps * scale))
        measured = trained(source, sample.tokens, seed, dims=1, null_share=0.5, steps=used)
        rows = {way: judged(getattr(measured, way), truth) for way in ("null", "code", "cheaper")}
        everywhere &= all(row["bound_holds"] for row in rows.values())
        record(
            "entropy_sources",
            claim="sources",
            source=name,
            truth=round(float(truth.mean()) / LENGTH, 4),
            **rows,
            within_two_percent=rows["null"]["excess_percent"] <= 2,
            coded=measured.coded,
            segments=segments,
            length=LENGTH,
            steps=used,
            batch=BATCH,
            seed=seed,
        )
    return everywhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["demonstration", "sources"], default=["demonstration", "sources"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, default=500, help="of the demonstration")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of `sources`")
    parser.add_argument("--segments", type=int, default=2000, help="held-out segments")
    options = parser.parse_args()
    holds = True
    for seed in options.seeds:
        if "sources" in options.only:
            holds &= sources(seed, options.scale, options.segments)
        if "demonstration" in options.only:
            holds &= demonstration(seed, options.steps, options.segments)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
