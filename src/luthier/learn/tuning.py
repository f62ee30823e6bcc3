"""Hugging Face trainers inside run folders: metrics, progress, stop requests, resume, the paper's learning rates.

`Paced` is mixed into a trainer class of TRL; `arguments` makes its settings from ours; `fit` runs it. The trainer's own
checkpoints lie in the run folder, as checkpoints/checkpoint-N; one that a crash cut short is not resumed from.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from luthier.core.console import Advance, Console
from luthier.core.errors import ConfigError, DataError, require
from luthier.core.run import RunFolder
from luthier.learn.loop import Diverged, stop_requests
from luthier.learn.meters import prefers_bf16
from luthier.learn.parallel import Ranks, transformer_blocks
from luthier.learn.schedule import learning_rate
from luthier.learn.tuning_config import TuningConfig

NOT_LOGGED = ("epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Paced:
    """Mixed into a trainer: warm-up from a tenth of the peak, decay to a fraction of it, weight decay on everything."""

    def __init__(self, *args: Any, pace: TuningConfig, **kwargs: Any) -> None:
        self.pace = pace
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The learning rate of `learn.schedule`, as a factor of the peak."""
        factor = partial(
            learning_rate,
            schedule=self.pace.schedule,
            peak=1.0,
            warmup=self.pace.warmup_steps(num_training_steps),
            total=num_training_steps,
            final_fraction=self.pace.final_fraction,
        )
        trainer: Any = self
        trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, factor)
        return trainer.lr_scheduler

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The trainer's, with the loss that `compute_metrics` calls `held_out_loss` where it gives one.

        The trainer's own is a mean over batches, in which a short one counts as much as a full one, and in which ranks
        repeat rows to fill theirs.
        """
        trainer: Any = super()
        output: EvalLoopOutput = trainer.evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found: Any = output.metrics
        if (exact := found.pop(f"{metric_key_prefix}_held_out_loss", None)) is not None:
            found[f"{metric_key_prefix}_loss"] = exact
        return output

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them, norms included, as in the paper."""
        return [name for name, _ in model.named_parameters()]


def arguments(kind: type[TrainingArguments], config: TuningConfig, who: Ranks, **settings: Any) -> Any:
    """The arguments of a trainer: `kind` is TrainingArguments or one of TRL's, `settings` what is special to it.

    Raises: ConfigError when the batch cannot be divided among the ranks, and for sharding on the CPU beside a GPU.
    """
    sharded, on_cpu = config.shard and who.world_size > 1, who.device.type == "cpu"
    if sharded and on_cpu and torch.accelerator.is_available():
        raise ConfigError(
            "shard: got device cpu, but torch divides models among this machine's GPUs",
            hint="leave device out, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
        )
    size = min(config.micro_batch_size, max(1, config.batch_size // who.world_size))
    if config.batch_size % (size * who.world_size):
        raise ConfigError(
            f"batch_size: got {config.batch_size}, which {who.world_size} ranks of {size} sequences cannot share",
            hint="make it a multiple of micro_batch_size times the number of ranks",
        )
    bf16 = config.precision == "bf16" or (config.precision == "auto" and prefers_bf16(who.device))
    given: dict[str, Any] = {
        "output_dir": str(config.out / "checkpoints"),
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": config.batch_size // (size * who.world_size),
        "num_train_epochs": config.epochs,
        "max_steps": config.steps or -1,
        "learning_rate": config.learning_rate,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.grad_clip or math.inf,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": bf16,
        "use_cpu": on_cpu,
        "activation_checkpointing": config.activation_checkpointing,
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "save_steps": config.checkpoint_every,
        "save_total_limit": config.keep_checkpoints,
        "eval_strategy": "steps" if config.eval_every else "no",
        "eval_steps": config.eval_every or None,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
    }
    if sharded:
        given |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    made = kind(**{**given, **settings})
    if sharded and on_cpu:
        _let_cpus_share(made)
    return made


def _let_cpus_share(made: TrainingArguments) -> None:
    """Have accelerate divide the model among ranks on CPUs, which it does where it sees several GPUs only.

    A departure from how it is meant to be used: `AcceleratorState` drops the FSDP plan of ranks that are MULTI_CPU, and
    no setting says otherwise. From the type MULTI_GPU it makes FSDP; the device and the process group were chosen
    before and stay. Each `TrainingArguments` begins anew. `Watch` checks that the model was divided.
    """
    state: Any = made.distributed_state
    state.distributed_type = DistributedType.MULTI_GPU


def lora(model: PreTrainedModel, config: TuningConfig) -> Any:
    """peft's settings for adapters on all linear layers of the blocks, or None where all weights are trained."""
    if not config.lora_rank:
        return None
    peft = require("peft", "train")
    linear = {
        name.rpartition(".")[2]
        for block in transformer_blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    return peft.LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=sorted(linear), task_type="CAUSAL_LM"
    )


@dataclass(frozen=True)
class Tuned:
    """The outcome: whether all updates were made, and the weights by name (on the main rank; empty if stopped)."""

    finished: bool
    step: int
    total: int
    seconds: float
    state_dict: dict[str, torch.Tensor]


def fit(
    trainer: Trainer, config: TuningConfig, run: RunFolder | None, who: Ranks, console: Console, *, loss: str = "loss"
) -> Tuned:
    """Train, resuming from the newest whole checkpoint; Ctrl-C and SIGTERM save and stop. All ranks call it.

    loss: what the rows of metrics.jsonl call it; `loss` alone is shown in nats per token.

    Raises: ConfigError for a checkpoint of a sharded run in one that is not, and the other way round.
    """
    folder = Path(str(trainer.args.output_dir))
    with who.main_first():
        if who.is_main:
            remove_cut_short(folder)
    watch = Watch(config, run, who, console, loss)
    with _own_environment():
        last = newest_checkpoint(folder)
        if last is not None:
            _check_layout(last, sharded=config.shard and who.world_size > 1)
            console.status(f"resuming at step {step_of(last)}")
        if run is not None:
            run.rewind(step_of(last) if last else 0)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        with stop_requests() as watch.stop, watch.showing(), quiet_libraries():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    finished = state.global_step >= state.max_steps
    return Tuned(
        finished, state.global_step, state.max_steps, watch.seconds, final_weights(trainer) if finished else {}
    )


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Take back what accelerate tells this process: it would divide the model of the next trainer too."""
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def final_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights under the model's own names, gathered from shards, adapters merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        merged = {name: weight.detach() for name, weight in model.state_dict().items()}
        return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in merged.items()}
    weights: Mapping[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return {name.removeprefix("module."): weight for name, weight in (weights or {}).items()}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is written last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(whole, key=step_of, default=None)


def _check_layout(checkpoint: Path, *, sharded: bool) -> None:
    """ConfigError where the trainer would look for other files than the checkpoint has."""
    written = (checkpoint / f"{FSDP_MODEL_NAME}.bin").exists()
    if written and not sharded:
        raise ConfigError(
            f"{checkpoint}: written with shard, and this run divides nothing",
            hint="resume with shard, on two ranks or more",
        )
    if sharded and not written:
        raise ConfigError(
            f"{checkpoint}: written without shard, and this run divides the model",
            hint="resume without shard, on any number of ranks",
        )


def remove_cut_short(folder: Path) -> None:
    """Remove checkpoints that a crash left without their last file."""
    for path in folder.glob("checkpoint-*"):
        if not (path / "trainer_state.json").exists():
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The number of updates that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


class Watch(TrainerCallback):
    """Writes the trainer's metrics to the run folder, moves the progress bar, and stops when asked to."""

    def __init__(
        self, config: TuningConfig, run: RunFolder | None, who: Ranks, console: Console, loss: str = "loss"
    ) -> None:
        self.config, self.run, self.who, self.console, self.loss = config, run, who, console, loss
        self.stop = threading.Event()
        self.seconds = 0.0
        self._advance: Advance | None = None
        self._bars = contextlib.ExitStack()
        self._began, self._first, self._loss = time.perf_counter(), 0, math.nan

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """The progress bar's life."""
        with self._bars:
            yield

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar. Raises: ConfigError when the model was to be divided, and is not."""
        whole = not any(isinstance(parameter, DTensor) for parameter in kwargs["model"].parameters())
        if self.config.shard and self.who.world_size > 1 and whole:
            raise ConfigError(
                "shard: expected a part of the model on each rank, but accelerate left the whole",
                hint="install another version of accelerate, or leave shard out",
            )
        self._began, self._first = time.perf_counter(), state.global_step
        bar = self.console.progress(state.max_steps, "training", done=state.global_step)
        self._advance = self._bars.enter_context(bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where asked to: all ranks at the same step."""
        self.seconds = time.perf_counter() - self._began
        asked = self.stop.is_set() or state.global_step - self._first == self.config.stop_after
        if self.who.sum([float(asked)])[0] and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        if state.global_step == state.max_steps:
            control.should_save = True  # before anything is measured: an evaluation cannot cost the run
        if self._advance is not None:
            self._advance(1, note="" if math.isnan(self._loss) else f"loss {self._loss:.3f}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A row of metrics.jsonl: of kind eval where all names start with eval_, else of kind train."""
        values = {key: value for key, value in (logs or {}).items() if key not in NOT_LOGGED}
        held_out = {k.removeprefix("eval_"): v for k, v in values.items() if k.startswith("eval_")}
        if "train_loss" in values or not values:
            return  # the summary that a trainer writes at its end: all of it is in the rows before
        self._loss = values.get("loss", self._loss)
        if not math.isfinite(values.get("loss", 0.0)) or not math.isfinite(values.get("grad_norm", 0.0)):
            raise Diverged(
                f"training diverged at step {state.global_step}: loss {values.get('loss')}",
                hint="lower the learning rate or lengthen the warm-up; earlier checkpoints are intact",
            )
        if self.run is not None:
            values = {self.loss if key == "loss" else key: value for key, value in values.items()}
            kind = "eval" if held_out else "train"
            seconds = round(time.perf_counter() - self._began, 3)
            self.run.log(kind, step=state.global_step, seconds=seconds, **(held_out or values))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While a trainer runs: no telemetry, hub, trackers or other progress bars, and what libraries plan is not news."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    names = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value for name, value in names.items() if before[name] is None})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def token_rows(rows: list[dict[str, list[int]]]) -> Any:
    """Tokenized rows as a `datasets.Dataset`. Raises: DataError when there are none."""
    datasets = require("datasets", "train")
    if not rows:
        raise DataError("no row is left to train on", hint="raise max_length, or check the rows' replies")
    return datasets.Dataset.from_list(rows)
