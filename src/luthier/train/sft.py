"""Supervised fine-tuning, arXiv 2511.10628 section 3: TRL's trainer with the paper's settings, our masks and template.

One conversation a row, nothing packed, cut on the right; the loss counts replies and their EOS alone. AdamW with decay
on everything, linear from a tenth of the peak over the peak to a thousandth.

Departures: the loss is one mean over the learned tokens of an update (theirs is a mean of the ranks' means, here
`loss_mean: per-rank`); rows are padded to the longest of their micro-batch, not to the full length, which changes
nothing but speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig as TrlSFTConfig
from trl import SFTTrainer

from luthier.core.console import Console
from luthier.core.run import RunFolder
from luthier.data.shards import IGNORED
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Paced, Tuned, arguments, fit, lora, quiet_libraries, token_rows
from luthier.train.tuning_configs import SftConfig

TokenRow = dict[str, list[int]]


class PacedSFTTrainer(Paced, SFTTrainer):
    """TRL's trainer at the paper's learning rates."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and for each row the summed loss of its learned tokens in nats and their number."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        targets = inputs["labels"][:, 1:]
        losses = cross_entropy(output.logits[:, :-1].float().mT, targets, reduction="none")  # 0 where ignored
        numbers = torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1)], dim=1)
        return numbers[:, 0].sum() / numbers[:, 1].sum(), numbers, numbers


def held_out_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Nats per learned token over all held-out rows, from `PacedSFTTrainer.prediction_step`."""
    nats, tokens = np.asarray(prediction.predictions, np.float64).sum(axis=0)
    return {"held_out_loss": float(nats / tokens)}


def sft(
    config: SftConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
    *,
    who: Ranks,
    run: RunFolder | None,
    console: Console,
) -> tuple[Tuned, dict[str, float]]:
    """Train `model` in place on rows of `data.replies`; the outcome, and the held-out loss in nats per learned token.

    Resumes from the newest checkpoint of the run. All ranks call it; only the main one has a `run`.
    """
    settings: dict[str, Any] = {
        "average_tokens_across_devices": config.loss_mean == "global",
        "max_length": None,  # the rows are cut already
        "shuffle_dataset": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    with quiet_libraries():
        trainer = PacedSFTTrainer(
            model=model,
            args=arguments(TrlSFTConfig, config, who, **settings),
            train_dataset=token_rows(list(rows)),
            eval_dataset=token_rows(list(held_out)) if held_out else None,
            processing_class=tokenizer,
            compute_metrics=held_out_loss,
            peft_config=lora(model, config),
            pace=config,
        )
    tuned = fit(trainer, config, run, who, console)
    if not tuned.finished or not held_out:
        return tuned, {}
    with quiet_libraries():
        loss = trainer.evaluate()["eval_loss"]
    return tuned, {"loss": loss, "perplexity": math.exp(loss), "rows": len(held_out)}
