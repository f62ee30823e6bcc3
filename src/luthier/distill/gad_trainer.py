"""GAD's third stage, arXiv 2511.10643 sections 2.1 and A.1: GRPO against a discriminator that learns along.

A subclass of `GRPOTrainer` and not a loop of its own. All that the pitfalls of such a loop are about has one place to
step in here: rewards are a callable that gets the sampled ids (an nn.Module would be fed text that was decoded and
encoded again), the discriminator learns after `_generate_and_score_completions` has fixed the advantages, and
checkpoints have a hook. What is left - sampling, vLLM, adapters, accumulation, ranks, exact token means - is TRL's.

One iteration: sample N replies per prompt; score them with D as it is; advantages; update D on the same replies; update
the student. The teacher's reply never is in the group, and the student's batch is the same whether D learns or not.

Departures: TRL adds 1e-4 to a group's standard deviation, the reference 1e-6; groups without spread are left out; the
token mean is exact over the batch. D is not sharded: every rank holds it whole, with its optimizer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from luthier.core.errors import ConfigError, DataError
from luthier.core.seeds import derive_seed
from luthier.distill.adversary import Adversary, Scored
from luthier.distill.discriminator import Discriminator
from luthier.distill.gad_config import GADConfig
from luthier.distill.objective import (
    informative_groups,
    length_residual,
    length_reward,
    next_discriminator_steps,
    token_advantages,
    token_moments,
)
from luthier.distill.replies import Duels, Ids, make_duels, reencoded, reply_text, student_reply, teacher_replies
from luthier.models.load import shorten

DISCRIMINATOR_DIR = "discriminator"
ACCURACY = "discriminator/accuracy"
Reward = Callable[..., list[float | None]]


class GADTrainer(GRPOTrainer):
    """Generative adversarial distillation from replies that a teacher gave once.

    `model` is a warmed-up student that was loaded from its folder, because TRL reads the KL reference from there;
    ConfigError when the two differ. Rows of the datasets have `prompt` and the teacher's reply in
    `args.teacher_column`. Accuracy of the discriminator on `eval_dataset` is logged as eval_discriminator/accuracy.
    `reward_funcs` are added to the adversarial reward, which is first in `args.reward_weights`. Other arguments are
    those of `GRPOTrainer`.
    """

    _tag_names = ["trl", "gad"]  # noqa: RUF012
    _name = "GAD"
    _paper = {  # noqa: RUF012
        "title": "Black-Box On-Policy Distillation of Large Language Models",
        "id": "2511.10643",
        "citation": textwrap.dedent("""\
            @article{ye2025blackbox,
                title        = {{Black-Box On-Policy Distillation of Large Language Models}},
                author       = {Tianzhu Ye and Li Dong and Zewen Chi and Xun Wu and Shaohan Huang and Furu Wei},
                year         = 2025,
                eprint       = {arXiv:2511.10643},
            }"""),
    }

    args: GADConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        discriminator: Discriminator,
        args: GADConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerFast | None = None,
        reward_funcs: list[Reward] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_source(model, args, kwargs.get("peft_config"))
        if args.adversarial_credit == "tokens" and reward_funcs:
            raise ConfigError(
                "adversarial_credit: other rewards are for whole replies, and would be lost on tokens",
                hint="credit replies, or give no reward_funcs",
            )
        super().__init__(
            model,
            list[Any]([self.adversarial_reward, *(reward_funcs or [])]),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_deepspeed_enabled:
            raise ConfigError(
                "DeepSpeed: the discriminator is a second model outside its engine",
                hint="launch with torchrun alone, or with FSDP2 through accelerate",
            )
        check_reference(self.model, self.ref_model)
        self.adversary = Adversary(discriminator, self.accelerator, args.adversary)
        self.discriminator_steps = args.discriminator_steps
        self._prompt_ids: list[Ids] = []
        self._teacher_texts: list[str] = []
        self._duels: Duels | None = None
        self._notes: dict[str, Tensor] = {}
        self._scored: Scored | None = None
        self._informative: Tensor | None = None

    # What TRL calls, in the order of one iteration.

    def _tokenize_prompts(self, prompts: list) -> Any:
        ids, *rest = super()._tokenize_prompts(prompts)
        longest = self.args.max_prompt_length
        if longest is not None:
            self._note("prompts/truncated_ratio", torch.tensor([len(row) > longest for row in ids]))
            ids = [row[-longest:] for row in ids]
        return ids, *rest

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self._prompt_ids = output[0]  # as sampling saw them: both sides of a duel get these
        return output

    def adversarial_reward(self, completion_ids: list[Ids], **columns: Any) -> list[float | None]:
        """One reward for each sampled reply of this rank: by the discriminator as it is before it learns from them."""
        self._duels = self._make_duels(completion_ids)
        self._scored = self._score(self._duels)
        kind = self.args.adversarial_reward
        if kind == "length":
            lengths = self._duels.teacher_lengths[self._duels.owner]
            return length_reward(self._duels.student_lengths, lengths).tolist()
        if kind == "random":
            return self._noise(len(completion_ids)).tolist()
        return self._scored.scores[0].tolist()

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        self._teacher_texts = [self._teacher_text(row) for row in inputs]  # TRL keeps some columns from rewards
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        assert self._duels is not None
        self._informative = None  # those of an earlier rollout are not these
        if self._group_size > 1:
            rewards = self._shape_rewards(rewards, gather(self._duels.student_lengths), self._group_size)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        own = slice(start, start + len(inputs))
        if self.args.adversarial_credit == "tokens":
            output["advantages"] = self._token_advantages(own, output["completion_ids"].shape[1])
        if self._informative is not None:
            output["advantages"][~self._informative[own]] = 0
        self._measure()
        self._write_notes()
        if self._learns:
            self._update_discriminator()
        self._scored = None  # with its graphs
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; a held-out accuracy of the discriminator then decides how often it learns."""
        super().log(logs, start_time)
        band, accuracy = self.args.discriminator_accuracy_band, logs.get(f"eval_{ACCURACY}")
        if band is not None and accuracy is not None:
            self.discriminator_steps = next_discriminator_steps(
                self.discriminator_steps, accuracy, (band[0], band[1]), self.args.max_discriminator_steps
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # before the Trainer's own files, the last of which makes the checkpoint whole
            self.save_adversary(folder / DISCRIMINATOR_DIR)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_adversary(Path(checkpoint) / DISCRIMINATOR_DIR)

    # The discriminator's side.

    @property
    def _mode(self) -> str:
        """TRL's names for what the model is in."""
        return "train" if self.model.training else "eval"  # type: ignore[union-attr]

    @property
    def _group_size(self) -> int:
        """Samples of a prompt."""
        return cast("int", self.num_generations if self._mode == "train" else self.num_generations_eval)

    @property
    def _learns(self) -> bool:
        """Whether the discriminator learns from this rollout: never in an evaluation."""
        return self._mode == "train" and not self.args.discriminator_frozen

    def _score(self, duels: Duels) -> Scored:
        """Scores by the discriminator as it is, with graphs where it learns from them."""
        return self.adversary.scored(duels) if self._learns else Scored(self.adversary.scores(duels), [])

    def save_adversary(self, folder: Path) -> None:
        """Write the discriminator, its optimizer and its pace to a folder that is complete or absent."""
        self.adversary.save(folder, steps=self.discriminator_steps)

    def load_adversary(self, folder: Path) -> None:
        """Read what `save_adversary` wrote. CheckpointError when it is missing or does not fit."""
        self.discriminator_steps = int(self.adversary.load(folder)["steps"])

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the student's learning rate, now and for what its schedule says later."""
        scheduler = cast("Any", self.lr_scheduler)
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]
        for group in cast("Any", self.optimizer).param_groups:
            group["lr"] *= factor

    def roll_back(self, checkpoint: Path) -> None:
        """Weights and optimizers of both sides as in a checkpoint; step, rates and D's pace stay as they are."""
        scheduler = cast("Any", self.lr_scheduler)
        rates, kept, pace = scheduler.base_lrs, scheduler.state_dict(), self.discriminator_steps
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))
        scheduler.load_state_dict(kept)
        scheduler.base_lrs, self.discriminator_steps = rates, pace
        for group, rate in zip(cast("Any", self.optimizer).param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def sample_duels(self, rows: list[dict[str, Any]]) -> Duels:
        """`num_generations_eval` samples for each of this rank's rows against the teacher's reply; nothing learns."""
        was_training = self.model.training  # type: ignore[union-attr]
        self.model.eval()  # type: ignore[union-attr]
        rows = [row for row in rows for _ in range(cast("int", self.num_generations_eval))]
        self._teacher_texts = [self._teacher_text(row) for row in rows]
        sampled = self._generate([row["prompt"] for row in rows])[1]
        duels = self._make_duels(sampled)
        self._metrics["eval"].clear()  # they belong to no evaluation
        self._notes.clear()
        self.model.train(was_training)  # type: ignore[union-attr]
        return duels

    def _teacher_text(self, row: dict[str, Any]) -> str:
        column = self.args.teacher_column
        if column not in row:
            raise DataError(
                f"no column {column!r} in {sorted(row)}", hint="set teacher_column to the teacher's replies"
            )
        return reply_text(row[column])

    def _make_duels(self, sampled: list[Ids]) -> Duels:
        """The duels of this rank, and how far sampled ids are from the canonical spelling of their text."""
        tokenizer, limit = self._tokenizer, cast("int", self.max_completion_length)
        teachers = teacher_replies(self._teacher_texts, tokenizer, limit)
        students = [student_reply(ids, self.eos_token_ids, tokenizer.eos_token_id) for ids in sampled]
        canonical = reencoded(students, tokenizer)
        changed = [a != b for a, b in zip(students, canonical, strict=True)]
        self._note("discriminator/reencode_mismatch", torch.tensor(changed))
        if self.args.discriminator_reencode:
            students, teachers = canonical, reencoded(teachers, tokenizer)
        return make_duels(self._prompt_ids, students, teachers, self.accelerator.device)

    def _noise(self, n: int) -> Tensor:
        """Standard normal rewards that depend on seed, step and rank alone."""
        names = self.state.global_step, self._step, self.accelerator.process_index
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, "random reward", *names))
        return torch.randn(n, generator=generator)

    def _shape_rewards(self, rewards: Tensor, lengths: Tensor, size: int) -> Tensor:
        """Rewards of all ranks (B, functions), controlled for length if asked; notes which groups have a spread."""
        residual, explained = length_residual(rewards[:, 0], lengths, size)
        self._note("discriminator/length_r2", explained[None])
        if self.args.adversarial_reward == "residual":
            rewards = torch.cat([residual[:, None], rewards[:, 1:]], 1)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._informative = informative_groups(total, size, self.args.min_group_std)
        self._note("discriminator/skipped_groups", 1 - self._informative.float())
        return rewards

    def _token_advantages(self, own: slice, width: int) -> Tensor:
        """(B, width) advantages of this rank's tokens: standardized over the tokens of their group on all ranks."""
        assert self._duels is not None
        rises, mask = self.adversary.rises(self._duels)
        moments: Tensor = gather(token_moments(rises, mask))
        grouped = moments.view(-1, self._group_size, moments.shape[1]).sum(1).repeat_interleave(self._group_size, 0)
        found = token_advantages(rises, mask, grouped[own])
        return torch.nn.functional.pad(found, (0, width - found.shape[1]))

    def _measure(self) -> None:
        """Note what the discriminator makes of this rollout before it learns from it."""
        assert self._duels is not None
        assert self._scored is not None
        student, teacher = self._scored.scores
        opponents, lengths = teacher[self._duels.owner], self._duels.teacher_lengths[self._duels.owner]
        self._note(ACCURACY, self.adversary.accuracy(self._scored.scores, self._duels))
        self._note("discriminator/student_score", student)
        self._note("discriminator/teacher_score", opponents)
        self._note("completions/teacher_length", lengths)
        unique = {tuple(ids) for ids in self._duels.students}
        self._note("completions/unique_share", torch.tensor([len(unique) / len(self._duels.students)]))

    def _update_discriminator(self) -> None:
        assert self._duels is not None
        scored = self._scored  # for the first update: the weights have not moved since
        for _ in range(self.discriminator_steps):
            told = self.adversary.update(self._duels, scored)
            scored = None
        for name, value in told.items():
            self._metrics["train"][f"discriminator/{name}"].append(value)
        self._metrics["train"]["discriminator/steps"].append(self.discriminator_steps)

    def _note(self, name: str, values: Tensor) -> None:
        """Keep the mean of values, to be logged over ranks, all of which hold the same number of them."""
        self._notes[name] = values.to(self.accelerator.device, torch.float32).mean()

    def _write_notes(self) -> None:
        """Log what was noted of this rollout: one exchange between ranks, and one wait for the device."""
        means = gather(torch.stack(list(self._notes.values()))[None]).mean(0).tolist()
        for name, mean in zip(self._notes, means, strict=True):
            self._metrics[self._mode][name].append(mean)
        self._notes.clear()


def _check_source(model: str | PreTrainedModel, args: GADConfig, peft_config: Any) -> None:
    """ConfigError when TRL would have no folder to read the KL reference from."""
    if isinstance(model, str) or args.beta == 0 or peft_config is not None or is_peft_model(model):
        return
    if not model.config._name_or_path:
        raise ConfigError(
            "beta: the KL reference is read from the student's folder, but this student was not loaded from one",
            hint="save the warmed-up student and load it again, or set beta=0",
        )


def check_reference(model: Any, reference: Any) -> None:
    """ConfigError unless the KL reference has the very weights that training starts from. None is no reference."""
    if reference is None:
        return
    ours, theirs = (dict(_plain(m).named_parameters()) for m in (model, reference))
    differing = [name for name, weight in ours.items() if name not in theirs or not _equal(weight, theirs[name])]
    if differing:
        raise ConfigError(
            f"the KL reference, read from {model.config._name_or_path}, is not the student that training starts from: "
            f"{len(differing)} of {len(ours)} tensors differ: {shorten(differing)}",
            hint="save the warmed-up student to a folder of its own and load it from there before training",
        )


def _plain(model: Any) -> Any:
    """The model without what accelerate wraps around it."""
    return getattr(model, "module", model)


def _equal(a: Tensor, b: Tensor) -> bool:
    full = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in (a, b)]
    return torch.equal(full[0].to(full[1].device), full[1])
