"""Direct preference optimization, arXiv 2511.10628 section 3: TRL's trainer with the paper's settings, our template.

A reply's score is the mean over its tokens of their log-probability minus that under the starting model (`loss: norm`);
with the sum (`loss: sum`) longer replies have larger scores, whatever they say. The starting model's log-probabilities
are computed once and kept in the run folder, so that it takes neither memory nor time in training.

Departures: the warm-up starts from a tenth of the peak, as in the other stages, where theirs starts from 0. A mean over
ranks needs no choice here: every pair counts once on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig as TrlDPOConfig
from trl import DPOTrainer

from luthier.core.console import Console
from luthier.core.run import RunFolder
from luthier.data.preferences import PairRow
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Paced, Tuned, arguments, fit, lora, quiet_libraries, token_rows
from luthier.train.measured import measured_once, rows_digest
from luthier.train.tuning_configs import DpoConfig

Keep = Callable[[str, Sequence[Any], int, Callable[[], Sequence[float]]], list[float]]
TRL_LOSS = {"norm": "sigmoid_norm", "sum": "sigmoid"}


def margins(logprobs: Tensor, reference: Tensor, lengths: Tensor, loss: str) -> Tensor:
    """m [B] of section 3.2: how much more than the reference the model likes the chosen reply than the rejected one.

    logprobs, reference [B, 2]: summed log-probabilities (nats) of the chosen and the rejected reply. lengths [B, 2]:
    tokens of each. loss: `norm` takes means over tokens, `sum` the sums.
    """
    scores = logprobs - reference
    if loss == "norm":
        scores = scores / lengths.clamp(min=1)
    return scores[:, 0] - scores[:, 1]


def dpo_loss(margin: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta m), the mean over pairs [B]."""
    return -logsigmoid(beta * margin).mean()


class PairTrainer(Paced, DPOTrainer):
    """TRL's trainer on rows of ids, at the paper's learning rates. `keep` is `measured_once`, bound to the run."""

    def __init__(self, *args: Any, keep: Keep, loss: str, **kwargs: Any) -> None:
        self.keep, self.loss = keep, loss
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # it is tokenized

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        rows = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        of = [self._precompute_model_hash, rows_digest(rows)]
        measure = partial(self._reference, rows, batch_size)
        values = self.keep(f"reference-{name}.json", of, 2 * len(rows), measure)
        columns = np.array(values, dtype=np.float32).reshape(-1, 2)
        for column, numbers in zip(("ref_chosen_logps", "ref_rejected_logps"), columns.T, strict=True):
            rows = rows.add_column(column, list(numbers))
        return rows

    def _reference(self, rows: Dataset, batch_size: int) -> list[float]:
        """Summed log-probabilities under the starting model: chosen and rejected of the first row, of the second, …"""
        loader = self.accelerator.prepare(DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator))
        found = []
        for batch in loader:
            pair = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, batch), dim=1)
            found.append(self.accelerator.gather_for_metrics(pair).cpu())
        return torch.cat(found).flatten().tolist()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and for each pair its margin and whether its chosen reply is likelier per token, now and before."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                labels=labels,
                fused_lm_head=True,
            )
        logprobs = torch.stack(output.log_probs.sum(dim=1).chunk(2), dim=1)
        lengths = torch.stack(inputs["completion_mask"].sum(dim=1).chunk(2), dim=1)
        reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)
        margin = margins(logprobs, reference, lengths, self.loss)
        preferred = [(part / lengths).diff(dim=1)[:, 0] < 0 for part in (logprobs, reference)]
        numbers = torch.stack([margin, *(part.float() for part in preferred)], dim=1)
        return dpo_loss(margin, self.beta), numbers, numbers


def held_out_scores(prediction: EvalPrediction, beta: float) -> dict[str, float]:
    """Means over held-out pairs of what `PairTrainer.prediction_step` returns for each, and the loss."""
    numbers = np.asarray(prediction.predictions)
    return {
        "held_out_loss": dpo_loss(torch.from_numpy(numbers[:, 0]), beta).item(),
        "pair_accuracy": float((numbers[:, 0] > 0).mean()),
        "margin": float(numbers[:, 0].mean()),
        "preferred": float(numbers[:, 1].mean()),
        "preferred_before": float(numbers[:, 2].mean()),
    }


def dpo(
    config: DpoConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[PairRow],
    held_out: Sequence[PairRow],
    *,
    who: Ranks,
    run: RunFolder | None,
    console: Console,
) -> tuple[Tuned, dict[str, float]]:
    """Train `model` in place on rows of `data.preferences`; the outcome, and means over the held-out pairs.

    Resumes from the newest checkpoint of the run. All ranks call it; only the main one has a `run`.
    """
    settings: dict[str, Any] = {
        "loss_type": [TRL_LOSS[config.loss]],
        "beta": config.strength,
        "precompute_ref_log_probs": True,
        "max_length": None,  # the rows are cut already
        "average_tokens_across_devices": False,
    }
    console.status("log-probabilities under the starting model: computed, or read from the run folder")
    sharded = config.shard and who.world_size > 1 and not config.lora_rank  # then `model` is whole only in training
    with quiet_libraries():
        trainer = PairTrainer(
            model=model,
            ref_model=copy.deepcopy(model) if sharded else None,
            args=arguments(TrlDPOConfig, config, who, **settings),
            train_dataset=token_rows(list(rows)),
            eval_dataset=token_rows(list(held_out)) if held_out else None,
            processing_class=tokenizer,
            compute_metrics=partial(held_out_scores, beta=config.strength),
            peft_config=lora(model, config),
            pace=config,
            keep=partial(measured_once, who=who, run=run),
            loss=config.loss,
        )
    trainer.ref_model = None  # all that is needed of it is in the rows
    tuned = fit(trainer, config, run, who, console)
    if not tuned.finished or not held_out:
        return tuned, {}
    with quiet_libraries():
        found = trainer.evaluate()
    names = ("loss", "pair_accuracy", "margin", "preferred", "preferred_before")
    return tuned, {"pairs": len(held_out), **{name: found[f"eval_{name}"] for name in names}}
