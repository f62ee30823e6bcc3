"""`GADConfig` and `WarmupConfig`: TRL's settings of GRPO with the paper's values as defaults, and those of GAD beside.

Left to the user: the batch. The paper's is 256 prompts of 8 replies per update, that is, per_device_train_batch_size
times gradient_accumulation_steps times ranks = 2048.

Departures: TRL adds 1e-4 to a group's standard deviation, the paper's code 1e-6; `loss_type` "dapo" is a mean over all
tokens of a batch, where theirs is one over micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig

from luthier.core.errors import ConfigError
from luthier.distill.adversary import AdversarySettings

CREDITS = ("reply", "tokens")
REWARDS = ("discriminator", "residual", "length", "random")


@dataclass
class GADConfig(GRPOConfig):
    """Settings of `GADTrainer`. Those without a text here are GRPO's or the Trainer's, and only have other defaults."""

    learning_rate: float = 1e-6
    """Learning rate of the student."""
    lr_scheduler_type: str = "constant"
    """How the student's learning rate changes."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 0.2
    """Largest gradient norm of the student."""
    num_train_epochs: float = 2.0
    """Passes over the prompts."""
    max_completion_length: int | None = 1536
    """Most tokens of a reply, of either side."""
    temperature: float = 0.8
    """Temperature of the student's samples."""
    num_generations: int | None = 8
    """Replies per prompt."""
    beta: float = 0.001
    """Weight of the KL term towards the student that training starts from."""
    delta: float | None = 3.0
    """Upper clip of the ratio; the reference's dual clip."""
    activation_checkpointing: bool | None = True
    """Recompute activations in the backward pass, of both networks."""
    save_steps: float = 50
    """Steps between checkpoints."""
    eval_steps: float | None = 50
    """Steps between evaluations, if there are any."""

    teacher_column: str = "completion"
    """Column with the teacher's reply: text, or one assistant message."""
    max_prompt_length: int | None = 2048
    """Prompts keep their last so many tokens. None keeps all."""
    adversarial_reward: str = "discriminator"
    """What rewards a reply. 'discriminator': its score; 'residual': its score without what log length explains inside a
    group; 'length': closeness to the length of the teacher's reply; 'random': noise. The last two are controls."""
    adversarial_credit: str = "reply"
    """What a token is credited with. 'reply': the advantage of its reply; 'tokens': what the score rises by at it, an
    experiment: the discriminator never learned from unfinished replies. `top_entropy_quantile` is GRPO's own way to
    learn only where the student is unsure."""
    min_group_std: float = 1e-6
    """Groups whose rewards have a smaller standard deviation move nothing."""

    discriminator_learning_rate: float = 1e-6
    """Learning rate of the discriminator, constant."""
    discriminator_weight_decay: float = 0.01
    """Its AdamW's weight decay."""
    discriminator_max_grad_norm: float = 0.2
    """Its largest gradient norm."""
    discriminator_micro_batch_size: int | None = None
    """Most sequences of a forward pass; None takes per_device_train_batch_size."""
    discriminator_kept_graphs: int = 2
    """So many of its forward passes are kept from the rewards to its first update and not run again."""
    discriminator_steps: int = 1
    """Its updates per rollout."""
    discriminator_accuracy_band: list[float] | None = None
    """Two numbers: after an evaluation, one update more when its held-out accuracy is below, one fewer above."""
    max_discriminator_steps: int = 8
    """Most updates per rollout with a band."""
    discriminator_frozen: bool = False
    """Never update it: a control, which collapses."""
    discriminator_reencode: bool = False
    """Let it read the canonical tokens of both replies' texts, in place of the tokens that were sampled."""
    discriminator_length_tolerance: float | None = None
    """Learn only from pairs whose lengths differ by at most this much in |ln ratio|."""
    discriminator_label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round."""
    discriminator_centering: float = 0.0
    """Weight of the squared sum of a pair's scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial_reward not in REWARDS:
            raise ConfigError(
                f"adversarial_reward: got {self.adversarial_reward!r}", hint=f"expected one of {', '.join(REWARDS)}"
            )
        if self.adversarial_credit not in CREDITS:
            raise ConfigError(
                f"adversarial_credit: got {self.adversarial_credit!r}", hint=f"expected one of {', '.join(CREDITS)}"
            )
        if self.adversarial_credit == "tokens" and (
            self.adversarial_reward != "discriminator" or self.discriminator_reencode
        ):
            raise ConfigError(
                "adversarial_credit: tokens are credited with the discriminator's score on them as they were sampled, "
                f"got adversarial_reward {self.adversarial_reward!r}, discriminator_reencode "
                f"{self.discriminator_reencode}",
                hint="leave both at their defaults, or credit replies",
            )
        if self.num_iterations != 1:
            raise ConfigError(
                f"num_iterations: got {self.num_iterations}, expected 1: rewards would be older than the discriminator",
                hint="raise gradient_accumulation_steps or the learning rate instead",
            )
        if self.discriminator_steps < 1:
            raise ConfigError(
                f"discriminator_steps: got {self.discriminator_steps}, expected at least 1",
                hint="set discriminator_frozen for a discriminator that does not learn",
            )
        self._check_band()

    def _check_band(self) -> None:
        band = self.discriminator_accuracy_band
        if band is None:
            return
        if len(band) != 2 or not 0.5 <= band[0] < band[1] <= 1:
            raise ConfigError(
                f"discriminator_accuracy_band: got {band}, expected two rising accuracies from 0.5 to 1",
                hint="for example 0.6 0.8",
            )
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ConfigError(
                "discriminator_accuracy_band: accuracy is measured on held-out prompts, and there is no evaluation",
                hint="set eval_strategy='steps' and give an eval_dataset",
            )

    @property
    def adversary(self) -> AdversarySettings:
        """What the discriminator's side reads of these settings."""
        return AdversarySettings(
            learning_rate=self.discriminator_learning_rate,
            weight_decay=self.discriminator_weight_decay,
            max_grad_norm=self.discriminator_max_grad_norm,
            micro_batch_size=self.discriminator_micro_batch_size or self.per_device_train_batch_size,
            kept_graphs=self.discriminator_kept_graphs,
            length_tolerance=self.discriminator_length_tolerance,
            label_smoothing=self.discriminator_label_smoothing,
            centering=self.discriminator_centering,
            checkpoint_activations=bool(self.activation_checkpointing),
        )


@dataclass
class WarmupConfig(GADConfig):
    """Settings of `WarmupTrainer`: one pass, no KL term, and a first stretch in which only the discriminator learns."""

    num_train_epochs: float = 1.0
    """Passes over the prompts."""
    beta: float = 0.0
    """There is no KL term in warm-up."""
    num_generations: int | None = 2
    """Unused: one reply per prompt is sampled. TRL wants two at least, so batches hold an even number of prompts."""
    discriminator_only_steps: int = 10
    """First steps, in which the student does not learn."""
