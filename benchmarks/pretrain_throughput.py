"""Training throughput of our loop against the Hugging Face Trainer: same model, windows, batch, optimizer and dtype.

They take turns in one process, round by round, so that a noisy machine disturbs all; the figure is the median ratio
of a round, with a bootstrap interval over rounds. Each runs as it does by default in a long run (Trainer: eager,
autocast, SDPA; ours: compiled blocks, bf16 over fp32 masters, chunked cross-entropy, attention kernel by our rule), and
each also the other way round, compiled or eager. Compilation happens before the timed steps.

    python benchmarks/pretrain_throughput.py [--rounds 8] [--steps 20] [--dtypes bf16 fp32]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from luthier.core.console import Console
from luthier.core.stats import bootstrap_median
from luthier.learn.loop import Job, LoopSettings, train
from luthier.learn.meters import Meter
from luthier.learn.objectives import CausalLoss
from luthier.learn.parallel import Ranks
from luthier.learn.precision import Weights
from luthier.learn.state import TrainState
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig
from luthier.train.config import PretrainConfig
from luthier.train.pretrain import choose_attention

BATCH, LENGTH, WARM = 8, 256, 3  # sequences, tokens, steps of each turn that are not timed
VOCABULARY = 2048
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def new_model() -> InstellaForCausalLM:
    model = InstellaForCausalLM(InstellaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SHAPE))
    initialize(model, 0)
    return model.train()


def trainer_rate(windows: np.ndarray, steps: int, dtype: str, *, compiled: bool) -> float:
    """Tokens/s of the Hugging Face Trainer."""
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            stamps.append(time.perf_counter())

    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in torch.from_numpy(windows)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=ADAMW["lr"],
            adam_beta2=ADAMW["betas"][1],
            weight_decay=ADAMW["weight_decay"],
            bf16=dtype == "bf16",
            torch_compile=compiled,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(new_model(), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return BATCH * LENGTH * (steps - WARM) / (stamps[-1] - stamps[WARM - 1])


def our_rate(windows: np.ndarray, steps: int, dtype: str, *, compiled: bool) -> float:
    """Tokens/s of our loop."""
    stamps: list[float] = []

    def batch_at(step: int) -> dict[str, np.ndarray]:
        stamps.append(time.perf_counter())
        rows = windows[step * BATCH : (step + 1) * BATCH]
        return {"input_ids": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}

    who = Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, low = new_model(), torch.bfloat16 if dtype == "bf16" else None
    choose_attention(model, PretrainConfig(sequence_length=LENGTH), low, who)
    if compiled:
        for block in model.model.layers:
            block.compile()
    objective = CausalLoss(model, plain_head=True).to(who.device)
    weights = Weights(objective, low)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            objective=objective,
            state=TrainState(weights, torch.optim.AdamW(weights.masters.values(), **ADAMW, fused=True)),
            batch_at=batch_at,
            learning_rate=lambda step: float(ADAMW["lr"]),
            seed=0,
            meter=Meter(1.0, 1.0),
            checkpoints=Path(folder),
            run=None,
        )
        settings = LoopSettings(
            steps=steps + 1,  # the last step writes a checkpoint, after the last stamp
            micro_batch_size=BATCH,
            grad_clip=1.0,
            log_every=0,
            checkpoint_every=0,
            keep_checkpoints=1,
            eval_every=0,
        )
        train(job, settings, who, Console())
    return BATCH * LENGTH * (steps - WARM) / (stamps[steps] - stamps[WARM])


CONTESTANTS: dict[str, Callable[[np.ndarray, int, str], float]] = {
    "luthier": partial(our_rate, compiled=True),
    "luthier, eager": partial(our_rate, compiled=False),
    "Trainer": partial(trainer_rate, compiled=False),
    "Trainer, compiled": partial(trainer_rate, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    generator = np.random.Generator(np.random.PCG64(0))
    windows = generator.integers(0, VOCABULARY, ((options.steps + 1) * BATCH, LENGTH + 1))
    parameters = sum(p.numel() for p in new_model().parameters())
    for dtype in options.dtypes:
        rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(options.rounds):
            for name, rate in CONTESTANTS.items():
                rates[name].append(rate(windows, options.steps, dtype))
        record(
            "pretrain_throughput",
            dtype=dtype,
            parameters=parameters,
            batch=f"{BATCH} x {LENGTH}",
            rounds=options.rounds,
            tokens_per_second={name: [round(rate) for rate in measured] for name, measured in rates.items()},
            **{
                f"{ours} / {theirs}": ratio(rates[ours], rates[theirs])
                for ours, theirs in (
                    ("luthier", "Trainer"),
                    ("luthier, eager", "Trainer"),
                    ("luthier", "Trainer, compiled"),
                )
            },
        )


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios with its bootstrap interval."""
    return bootstrap_median([a / b for a, b in zip(ours, theirs, strict=True)]).text(2)


if __name__ == "__main__":
    main()
