"""Training throughput of our loop against the Hugging Face Trainer's and litgpt's, on equal terms.

Equal are the shape of the model, windows, batch, AdamW's settings, clipping at 1, and dtype. They take turns in one
process, round by round, so that a noisy machine disturbs all; the figure is the median ratio of a round, with a
bootstrap interval over rounds. Each runs as it does by default in a long run, and each also the other way round,
compiled or eager. Compilation happens before the timed steps; none of them logs or saves during these.

- Ours: compiled blocks, bf16 over fp32 masters, chunked cross-entropy, attention kernel by our rule.
- Trainer, with our model: eager, autocast, SDPA.
- litgpt, with `--litgpt FOLDER`: its own model in our shape (RMSNorm, SwiGLU, queries and keys normalized over the
  whole width) in its own `litgpt.pretrain.main` and `fit`, on Lightning Fabric: the whole model compiled, which no
  setting of it switches off; bf16-mixed, which is autocast, its default on CPUs too; SDPA; whole logits, cross-entropy
  in chunks of 128 targets; AdamW fused on CUDA only. Eager is `torch.compiler.set_stance("force_eager")` around it.

    python benchmarks/pretrain_throughput.py [--rounds 8] [--steps 17] [--dtypes bf16 fp32] [--litgpt FOLDER]

litgpt is no dependency. A folder of its own, outside the repository, takes what our environment lacks of it, 21 MB:

    .venv/bin/pip install --no-deps --target FOLDER litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 \
        torchmetrics==1.9.0 jsonargparse==4.41.0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from record import record
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
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

BATCH, LENGTH, WARM = 8, 256, 3  # sequences, tokens, steps of each turn before those that are timed
VOCABULARY = 2048
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LITGPT_PACKAGES = ("litgpt", "lightning")


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
            max_steps=WARM + steps,
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
    return BATCH * LENGTH * steps / (stamps[-1] - stamps[WARM - 1])


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
            steps=WARM + steps + 1,  # the last step writes a checkpoint, after the last stamp
            micro_batch_size=BATCH,
            grad_clip=1.0,
            log_every=0,
            checkpoint_every=0,
            keep_checkpoints=1,
            eval_every=0,
        )
        train(job, settings, who, Console())
    return BATCH * LENGTH * steps / (stamps[WARM + steps] - stamps[WARM])


def litgpt_rate(windows: np.ndarray, steps: int, dtype: str, *, compiled: bool) -> float:
    """Tokens/s of litgpt's pretraining: its `main` builds model, optimizer and loaders, and hands them to its `fit`."""
    from lightning import Fabric
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs

    stamps: list[float] = []
    total = WARM + steps

    def stamp(*_: object) -> None:
        if torch.cuda.is_available() and len(stamps) + 1 in (WARM, total):
            torch.cuda.synchronize()  # its loop waits for the device only where it logs
        stamps.append(time.perf_counter())

    fabric = Fabric(devices=1, precision="bf16-mixed" if dtype == "bf16" else "32-true", loggers=[])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(pretrain, "save_checkpoint"))  # the last one; it would parse our sys.argv
        stack.callback(register_optimizer_step_post_hook(stamp).remove)
        stack.enter_context(torch.compiler.set_stance("default" if compiled else "force_eager"))
        pretrain.main(
            fabric=fabric,
            devices=1,
            seed=0,
            initial_checkpoint_dir=None,
            resume=False,
            config=litgpt_config(),
            data=litgpt_data(windows),
            out_dir=folder,
            tokenizer_dir=None,
            tokenizer=None,
            train=TrainArgs(
                save_interval=None,
                log_interval=total + 1,
                global_batch_size=BATCH,
                micro_batch_size=BATCH,
                max_tokens=total * BATCH * LENGTH,
                max_norm=1.0,
                min_lr=ADAMW["lr"],
                lr_warmup_steps=0,
            ),
            eval=EvalArgs(interval=total + 1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": dict(ADAMW)},
        )
    if len(stamps) != total:
        raise RuntimeError(f"litgpt took {len(stamps)} steps, expected {total}")
    return BATCH * LENGTH * steps / (stamps[-1] - stamps[WARM - 1])


def litgpt_config() -> Any:
    """Our shape as a `litgpt.Config`."""
    from litgpt import Config

    return Config(
        name="instella",
        block_size=LENGTH,
        n_layer=SHAPE["num_hidden_layers"],
        n_embd=SHAPE["hidden_size"],
        n_head=SHAPE["num_attention_heads"],
        intermediate_size=SHAPE["intermediate_size"],
        padded_vocab_size=VOCABULARY,
        vocab_size=VOCABULARY,
        norm_class_name="RMSNorm",
        norm_qk=True,
        norm_qk_type="olmo2",  # over the whole width, before the split into heads
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
        mlp_class_name="LLaMAMLP",
    )


def litgpt_data(windows: np.ndarray) -> SimpleNamespace:
    """What litgpt asks of a data module."""
    rows: Any = torch.from_numpy(windows)
    loader = partial(DataLoader, rows, batch_size=BATCH)
    return SimpleNamespace(
        connect=lambda **_: None,
        prepare_data=lambda: None,
        setup=lambda: None,
        train_dataloader=loader,
        val_dataloader=loader,
    )


def load_litgpt(folder: Path, parameters: int) -> dict[str, Any]:
    """Make litgpt importable; what the row says of it. SystemExit without litgpt or when its model is not as large."""
    sys.path.append(str(folder.resolve()))  # last, so that our environment's packages stay what they are
    try:
        from litgpt import GPT
    except ImportError as error:
        raise SystemExit(
            f"--litgpt {folder}: {error}; install it as --help says, with pip --target {folder}"
        ) from error
    with torch.device("meta"):
        theirs = sum(p.numel() for p in GPT(litgpt_config()).parameters())
    if abs(theirs - parameters) > parameters / 100:
        raise SystemExit(f"litgpt's model has {theirs} parameters, expected ours, {parameters}, within 1 %")
    return {"litgpt_parameters": theirs, "litgpt_versions": {name: version(name) for name in LITGPT_PACKAGES}}


Rate = Callable[[np.ndarray, int, str], float]
CONTESTANTS: dict[str, Rate] = {
    "luthier": partial(our_rate, compiled=True),
    "luthier, eager": partial(our_rate, compiled=False),
    "Trainer": partial(trainer_rate, compiled=False),
    "Trainer, compiled": partial(trainer_rate, compiled=True),
}
LITGPT: dict[str, Rate] = {
    "litgpt": partial(litgpt_rate, compiled=True),
    "litgpt, eager": partial(litgpt_rate, compiled=False),
}
RATIOS = (
    ("luthier", "Trainer"),
    ("luthier, eager", "Trainer"),
    ("luthier", "Trainer, compiled"),
    ("luthier", "litgpt"),
    ("luthier, eager", "litgpt, eager"),
    ("luthier", "litgpt, eager"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=17, help=f"timed steps of each turn, after {WARM} that are not")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--litgpt", type=Path, metavar="FOLDER", help="let litgpt, installed there, take turns too")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    generator = np.random.Generator(np.random.PCG64(0))
    windows = generator.integers(0, VOCABULARY, ((WARM + options.steps + 1) * BATCH, LENGTH + 1))
    parameters = sum(p.numel() for p in new_model().parameters())
    peer = load_litgpt(options.litgpt, parameters) if options.litgpt else {}
    contestants = CONTESTANTS | LITGPT if peer else CONTESTANTS
    for dtype in options.dtypes:
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, rate in contestants.items():
                rates[name].append(rate(windows, options.steps, dtype))
        record(
            "pretrain_throughput",
            dtype=dtype,
            parameters=parameters,
            **peer,
            batch=f"{BATCH} x {LENGTH}",
            rounds=options.rounds,
            tokens_per_second={name: [round(rate) for rate in measured] for name, measured in rates.items()},
            **{f"{ours} / {theirs}": ratio(rates[ours], rates[theirs]) for ours, theirs in RATIOS if theirs in rates},
        )


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios with its bootstrap interval."""
    return bootstrap_median([a / b for a, b in zip(ours, theirs, strict=True)]).text(2)


if __name__ == "__main__":
    main()
