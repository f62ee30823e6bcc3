"""GAD's warm-up, arXiv 2511.10643 sections 2.1 and A.2: D learns alone for a few steps, then both learn.

The student learns by cross-entropy on the teacher's replies (SeqKD), the discriminator from the student's own samples,
as in the adversarial stage. Without a warmed-up discriminator the paper's GAD ends below SeqKD (Table 3). Save student
and discriminator to folders afterwards: the adversarial stage starts from both, and reads its KL reference from there.

Departures: one sample per prompt where the reference draws eight and repeats the teacher's reply for each; the token
mean is exact over the batch; D alone takes exactly `discriminator_only_steps`, where the reference takes one fewer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.data.shards import IGNORED
from luthier.distill.gad_config import WarmupConfig
from luthier.distill.gad_trainer import GADTrainer
from luthier.distill.replies import Duels, pad_right


class WarmupTrainer(GADTrainer):
    """The stage before `GADTrainer`, with its arguments and a `WarmupConfig`. Every row of a batch is a new prompt."""

    _tag_names = ["trl", "gad-warmup"]  # noqa: RUF012
    _name = "GAD warm-up"
    args: WarmupConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_generations = self.num_generations_eval = 1  # TRL's settings want two; its machinery does not

    @property
    def discriminator_alone(self) -> bool:
        """Whether the student does not learn yet."""
        return self.state.global_step < self.args.discriminator_only_steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in TRL, but without a backward pass while the discriminator learns alone: no gradient, so no update."""
        if not self.discriminator_alone:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        self._prepare_inputs(inputs)
        self._step += 1
        return torch.zeros((), device=self.accelerator.device)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        assert self._duels is not None
        lesson = lessons(self._duels)
        counted = self.accelerator.gather((lesson["labels"] != IGNORED).sum()).sum()
        return {**output, **lesson, "num_items_in_batch": counted}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), reduction="sum")
        share = inputs["num_items_in_batch"] / self.accelerator.num_processes  # of this rank in the mean
        if self._mode == "train":
            share = share * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        counted = torch.stack([nats.detach(), (inputs["labels"] != IGNORED).sum()])
        totals = self.accelerator.reduce(counted, reduction="sum")
        self._metrics[self._mode]["seqkd/nats_per_token"].append(float(totals[0] / totals[1].clamp(min=1)))
        return nats / share


def lessons(duels: Duels) -> dict[str, Tensor]:
    """Prompt and teacher's reply of each student reply, padded right: ids, mask, and labels of the reply, (N, T)."""
    device = duels.owner.device
    replies = [duels.teachers[owner] for owner in duels.owner.tolist()]
    batch = pad_right(list(zip(duels.prompts, replies, strict=True)), device)
    starts = torch.tensor([len(prompt) for prompt in duels.prompts], device=device)
    places = torch.arange(batch["input_ids"].shape[1], device=device)
    replied = (places >= starts[:, None]) & batch["attention_mask"].bool()
    labels = batch["input_ids"].where(replied, IGNORED)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
