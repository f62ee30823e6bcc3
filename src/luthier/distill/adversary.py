"""The discriminator's side of GAD, arXiv 2511.10643 section 2.1: it scores rollouts and learns from them.

The loss is a function of the scores alone. Its slope by each score is computed first, from scores that are known
already where the rollout was rewarded with them; then each micro-batch is run once with gradients, so memory is that of
one micro-batch however many replies a prompt has. Gradients are summed over ranks by hand, in one call per update:
every rank makes the same number of updates whatever it sampled.

Departures: a teacher reply is scored once and not once per sample; the mean is over all pairs of all ranks exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import CheckpointError, DataError
from luthier.core.files import atomic_folder, read_json, write_json
from luthier.distill.discriminator import Discriminator
from luthier.distill.objective import bradley_terry, length_matched, pair_accuracy
from luthier.distill.replies import Duels, pad_right


@dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """How the discriminator learns; the defaults are the paper's where it has them."""

    learning_rate: float = 1e-6
    """Constant."""
    weight_decay: float = 0.01
    """AdamW's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    max_grad_norm: float = 0.2
    """Largest L2 norm of the gradient."""
    micro_batch_size: int = 8
    """Sequences of one rank in one forward pass; changes speed and memory, not the result."""
    length_tolerance: float | None = None
    """Learn only from pairs whose lengths differ by at most this much in |ln ratio|; None: from all."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round."""
    centering: float = 0.0
    """Weight of the squared sum of a pair's scores."""
    checkpoint_activations: bool = False
    """Less memory, about a third more time."""


@dataclass
class Adversary:
    """A discriminator with its optimizer, on one rank of `accelerator`."""

    discriminator: Discriminator
    accelerator: Accelerator
    settings: AdversarySettings = field(default_factory=AdversarySettings)
    updates: int = 0

    def __post_init__(self) -> None:
        self.discriminator.to(self.accelerator.device).eval()
        if self.settings.checkpoint_activations:
            self.discriminator.checkpoint_activations()
        self.parameters = list(self.discriminator.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            broadcast(parameter.data)  # from rank 0: later updates are equal on all ranks, so the start must be
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )

    @torch.no_grad()
    def scores(self, duels: Duels) -> tuple[Tensor, Tensor]:
        """Scores of the student replies (N,) and of the teacher replies (P,), in fp32 and without a gradient."""
        flat = torch.zeros(len(duels.students) + len(duels.teachers), device=self.accelerator.device)
        for rows, scored in self._micro_batches(duels):
            flat[rows] = scored
        return flat[: len(duels.students)], flat[len(duels.students) :]

    def update(self, duels: Duels, scores: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        """One step on all pairs of all ranks. `scores` are those of `self.scores`, if the weights did not move since.

        Returns the loss in nats per pair, the share of pairs used and the gradient's norm before clipping, over ranks.
        """
        student, teacher = (side.detach().requires_grad_() for side in scores or self.scores(duels))
        loss, used = self._loss(student, teacher, duels)
        slopes = torch.cat(torch.autograd.grad(loss, [student, teacher]))
        totals = self._sum(torch.stack([loss.detach(), used, used.new_tensor(len(duels.students))]))
        pairs = float(totals[1])
        if pairs == 0:  # on all ranks together, so none of them waits for another
            return {"loss": float("nan"), "used": 0.0, "grad_norm": float("nan")}
        for rows, scored in self._micro_batches(duels):
            (scored * slopes[rows]).sum().backward()
        norm = self._step(pairs)
        return {"loss": float(totals[0]) / pairs, "used": pairs / float(totals[2]), "grad_norm": norm}

    def accuracy(self, scores: tuple[Tensor, Tensor], duels: Duels) -> Tensor:
        """Per pair, whether the teacher's reply has the higher score: (N,)."""
        return pair_accuracy(*scores, duels.owner)

    def _loss(self, student: Tensor, teacher: Tensor, duels: Duels) -> tuple[Tensor, Tensor]:
        """The summed loss with gradients to the scores, and how many pairs are in it."""
        weights = torch.ones_like(student)
        if self.settings.length_tolerance is not None:
            lengths = duels.student_lengths, duels.teacher_lengths
            weights = length_matched(*lengths, duels.owner, self.settings.length_tolerance)
        options = {"smoothing": self.settings.label_smoothing, "centering": self.settings.centering}
        return bradley_terry(student, teacher, duels.owner, weights=weights, **options), weights.sum()

    def _micro_batches(self, duels: Duels) -> Iterator[tuple[list[int], Tensor]]:
        """(rows, scores of these rows) over all sequences, those of similar length together."""
        sequences = duels.sequences()
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row][0]) + len(sequences[row][1]))
        for start in range(0, len(order), self.settings.micro_batch_size):
            rows = order[start : start + self.settings.micro_batch_size]
            batch = pad_right([sequences[row] for row in rows], self.accelerator.device)
            with self.accelerator.autocast():
                scored = self.discriminator(**batch)
            yield rows, scored

    def _step(self, pairs: float) -> float:
        """Sum the gradients over ranks, divide by the number of pairs, clip, update."""
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        flat = self._sum(flat).div_(pairs)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.copy_(flat[: p.numel()].view_as(p))
                flat = flat[p.numel() :]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return float(norm)

    def _sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def save(self, folder: Path, **state: Any) -> None:
        """Write weights, optimizer and `state` to a folder that is complete or absent. The main rank calls it."""
        with atomic_folder(folder) as temporary:
            weights = {name: tensor.cpu().contiguous() for name, tensor in self.discriminator.state_dict().items()}
            save_file(weights, temporary / "discriminator.safetensors")
            torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
            write_json(temporary / "state.json", {"updates": self.updates, **state})

    def load(self, folder: Path) -> Mapping[str, Any]:
        """Read such a folder into this object; returns its state. CheckpointError when it cannot be read."""
        try:
            state = read_json(folder / "state.json")
            self.discriminator.load_state_dict(load_file(folder / "discriminator.safetensors"))
            optimizer = torch.load(folder / "optimizer.pt", map_location=self.accelerator.device, weights_only=True)
            self.optimizer.load_state_dict(optimizer)
        except (OSError, RuntimeError, ValueError, DataError) as error:
            raise CheckpointError(
                f"{folder}: the discriminator of this checkpoint cannot be read ({str(error).splitlines()[0]})",
                hint="resume from an earlier checkpoint, or start the run again",
            ) from error
        self.updates = int(state["updates"])
        return state
