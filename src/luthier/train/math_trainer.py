"""Reinforcement learning on mathematics, arXiv 2511.10628 section 5.2: GRPO with verified rewards, on TRL's trainer.

One rollout: `rollout_prompts` questions, `generations` replies to each, graded; advantages inside each group; then an
update for every `batch_size` questions, in order and each once. What is TRL's: batches, scoring, the reference, ranks,
adapters, vLLM. Ours: the sampler, the reward, advantages with 1e-6 (TRL adds 1e-4), k3 that is cut at 10, and rollouts
in checkpoints, without which a resumed run would sample again and differ.

Departures: one mean over the tokens of a rollout (theirs is one over each micro-batch, here `loss_mean: micro-batch`);
micro-batches have a number of sequences, not a budget of tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, split_tensor_dict

from luthier.core.errors import ConfigError, DataError
from luthier.core.seeds import derive_seed
from luthier.learn.meters import prefers_bf16
from luthier.learn.parallel import Ranks
from luthier.learn.tuning import Paced, arguments, step_of
from luthier.learn.tuning_config import TuningConfig
from luthier.llm.generation import Vocabulary
from luthier.train.marking import Marker, shares
from luthier.train.policy_loss import group_advantages, informative, k3, policy_loss
from luthier.train.rollouts import Question, sample
from luthier.train.tuning_configs import MathRLConfig

TRL_LOSS = {"global": "dapo", "micro-batch": "bnpo"}
Batch = dict[str, Any]


class MathTrainer(Paced, GRPOTrainer):
    """TRL's trainer with the paper's loss and rewards.

    Rows of the data set are numbers of `questions`, as text: no prompt is tokenized twice.
    """

    args: Any
    model: Any
    num_generations: int
    _buffered_inputs: Any

    def __init__(
        self,
        *args: Any,
        questions: Sequence[Question],
        vocabulary: Vocabulary,
        marker: Marker,
        measure: Callable[[], Mapping[str, float]],
        reference: PreTrainedModel | None,
        kl: float,
        **kwargs: Any,
    ) -> None:
        self.questions, self.vocabulary, self.marker, self.measure = questions, vocabulary, marker, measure
        self._rewards = torch.empty(0)
        self._rollout: Batch | None = None
        super().__init__(*args, reward_funcs=[self.correct], **kwargs)
        self.beta = kl
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self._frozen(reference)

    def _frozen(self, reference: PreTrainedModel) -> Any:
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference.eval(), evaluation_mode=True)

    # A rollout, in the order in which TRL asks.

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        """The next micro-batch; a new rollout where the last one is used up. In order: a group stays together."""
        every = self.args.steps_per_generation
        if self._step % every == 0 or self._rollout is None:
            self._rollout = self._generate_and_score_completions(generation_batch)
        if self._buffered_inputs is None or self._step % every == 0:
            self._buffered_inputs = split_tensor_dict(self._rollout, every)
        return without_padding(self._buffered_inputs[self._step % every])

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.questions[int(number)].ids for number in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm or self.is_fsdp_enabled:  # ranks that hold parts of a model must take each step together
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout, first = self._step // self.args.steps_per_generation, self.accelerator.process_index * len(prompt_ids)
        seeds = [derive_seed(self.args.seed, "rollout", rollout, first + place) for place in range(len(prompt_ids))]
        with self.accelerator.autocast():
            replies = sample(
                self.accelerator.unwrap_model(self.model),
                self.vocabulary,
                prompt_ids,
                seeds,
                max_tokens=self.args.max_completion_length,
                temperature=self.args.temperature,
            )
        return [reply.tokens for reply in replies], None

    def correct(self, prompts: list[str], completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        """1 for a reply with the right answer, else 0."""
        statuses = self.marker.statuses(completions, [self.questions[int(number)].problem for number in prompts])
        for name, share in shares(statuses).items():
            log_metric(f"answers/{name}", share)
        return [float(status == "correct") for status in statuses]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards[:, 0].view(-1, self.num_generations)  # of all ranks
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        batch: Batch = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        batch["advantages"] = group_advantages(self._rewards).flatten()[start : start + len(inputs)]
        self._metrics["train"]["informative_groups"].append(informative(self._rewards).item())
        return batch

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"]
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.shape[1], compute_entropy=True
        )
        old = inputs.get("old_per_token_logps", logprobs.detach())
        clip = (self.epsilon_low, self.epsilon_high, self.args.delta)
        loss = policy_loss(logprobs, old, inputs["advantages"][:, None], clip)
        values = {"entropy": entropy, "clipped": self._clipped(logprobs, old, inputs["advantages"][:, None])}
        if self.beta:
            values["kl"] = k3(logprobs, inputs["ref_per_token_logps"])
            loss = loss + self.beta * values["kl"]
        self._note(values, mask)
        return (loss * mask).sum() / self._tokens(inputs["num_items_in_batch"], mask)

    def _tokens(self, in_rollout: Tensor, mask: Tensor) -> Tensor:
        """What a micro-batch's summed loss is divided by, so that its gradients add up to those of a mean."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * self.current_gradient_accumulation_steps
        updates = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return in_rollout.clamp(min=1) / (self.accelerator.num_processes * updates)

    def _clipped(self, logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """Where the ratio is outside of what counts, on the side that matters."""
        ratio = (logprobs.detach() - old).exp()
        too_low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        return (too_low | ((ratio > 1 + self.epsilon_high) & (advantages > 0))).float()

    def _note(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Log means over the tokens of all ranks."""
        sums = torch.stack([mask.sum().float(), *((value.detach() * mask).sum() for value in values.values())])
        count, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self._metrics["train"][name].append(total / max(count, 1.0))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `measure` says of the model as it is."""
        found = {f"eval_{name}": value for name, value in self.measure().items()}
        self.model.eval()  # TRL then does not add what it knows of training
        self.log(dict(found))
        self.model.train()
        return found

    # Checkpoints.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._rollout is not None and self._step % self.args.steps_per_generation:
            folder.mkdir(parents=True, exist_ok=True)  # before the file that makes the checkpoint whole
            torch.save(self._rollout, folder / f"rollout-{self.args.process_index}-of-{self.args.world_size}.pt")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._step = step_of(Path(checkpoint)) * self.args.gradient_accumulation_steps
        if not self._step % self.args.steps_per_generation:
            return
        file = Path(checkpoint) / f"rollout-{self.args.process_index}-of-{self.args.world_size}.pt"
        if not file.exists():
            raise ConfigError(
                f"{checkpoint}: it lies between the updates of a rollout of another number of ranks",
                hint="resume with as many ranks as before",
            )
        rollout = torch.load(file, weights_only=True, map_location="cpu")  # it knows no cpu:0, the device of CPU ranks
        self._rollout = send_to_device(rollout, self.accelerator.device)


class EvaluateEvery(TrainerCallback):
    """Asks for the trainer's `evaluate` every so many updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an update."""
        if state.global_step % self.updates == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True


def without_padding(batch: Batch) -> Batch:
    """The batch without columns that are padding in every row: prompts are padded on the left, replies on the right."""
    prompts, replies = (batch[f"{side}_mask"].any(dim=0) for side in ("prompt", "completion"))
    replies[0] = True  # a reply is never empty, but all may be masked
    cut = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": replies, "completion_mask": replies}
    cut |= {"old_per_token_logps": replies, "ref_per_token_logps": replies}
    return {name: value[:, cut[name]] if name in cut else value for name, value in batch.items()}


def prompt_order(questions: int, wanted: int, seed: int) -> list[int]:
    """Numbers of `wanted` questions in the order of training: every pass over all of them has an order of its own."""
    order: list[int] = []
    for epoch in range(math.ceil(wanted / questions)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", epoch))
        order += torch.randperm(questions, generator=generator).tolist()
    return order[:wanted]


def updates_of(config: MathRLConfig, questions: int) -> int:
    """Optimizer updates on so many questions. Raises: DataError when they do not fill one rollout."""
    if config.steps:
        return config.steps
    rollouts = int(config.epochs * questions) // config.rollout_prompts
    if not rollouts:
        raise DataError(
            f"{questions} questions, fewer than a rollout has ({config.rollout_prompts})",
            hint="give more data, lower rollout_prompts, or set steps, which passes over them again",
        )
    return rollouts * (config.rollout_prompts // config.batch_size)


def make_trainer(
    config: MathRLConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    marker: Marker,
    measure: Callable[[], Mapping[str, float]],
    who: Ranks,
    **more: Any,
) -> MathTrainer:
    """The trainer for all updates that the config asks for. The reference is `model` as it is given."""
    steps = updates_of(config, len(questions))
    rollouts = math.ceil(steps * config.batch_size / config.rollout_prompts)
    order = prompt_order(len(questions), rollouts * config.rollout_prompts, config.seed)
    pace = in_sequences(config, steps)
    return MathTrainer(
        model=model,
        reference=copy.deepcopy(model) if config.kl and not config.lora_rank else None,
        kl=config.kl,
        args=arguments(GRPOConfig, pace, who, **trl_settings(config, who)),
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in order]}),
        processing_class=tokenizer,
        questions=questions,
        vocabulary=vocabulary,
        marker=marker,
        measure=measure,
        callbacks=[EvaluateEvery(config.eval_every)] if config.eval_every else None,
        pace=pace,
        **more,
    )


def in_sequences(config: MathRLConfig, steps: int) -> TuningConfig:
    """What the trainer shares with other stages, with batches counted in sequences. Evaluation is asked for here."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TuningConfig)}
    return TuningConfig(
        **{**shared, "batch_size": config.batch_size * config.generations, "steps": steps, "eval_every": 0}
    )


def trl_settings(config: MathRLConfig, who: Ranks) -> dict[str, Any]:
    """TRL's names for the settings of section 5.2."""
    low, high, dual = config.clip
    settings: dict[str, Any] = {
        "num_generations": config.generations,
        "generation_batch_size": config.rollout_prompts * config.generations,
        "max_completion_length": config.max_lengths[1],
        "temperature": config.temperature,
        "beta": 0.0,  # TRL would load the reference from the model's name
        "epsilon": low,
        "epsilon_high": high,
        "delta": dual,
        "loss_type": TRL_LOSS[config.loss_mean],
        "mask_truncated_completions": config.truncated == "mask",
        "shuffle_dataset": False,
        "disable_dropout": True,
        "use_vllm": config.vllm != "off",
        "vllm_mode": config.vllm if config.vllm != "off" else "colocate",
        "vllm_model_impl": "transformers",
        "vllm_importance_sampling_correction": False,  # old log-probabilities are the trainer's, never the sampler's
    }
    return settings | {"bf16": uses_bf16(config, who)}


def uses_bf16(config: MathRLConfig, who: Ranks) -> bool:
    """Whether to compute in bf16; `auto` does on a GPU alone: one token of each row at a time is slower in it here."""
    on_gpu = who.device.type != "cpu" and prefers_bf16(who.device)
    return config.precision == "bf16" or (config.precision == "auto" and on_gpu)
