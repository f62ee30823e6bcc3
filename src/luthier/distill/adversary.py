"""The discriminator's side of GAD, arXiv 2511.10643 section 2.1: it scores rollouts and learns from them.

The loss is a function of the scores alone. Its slope by each score is computed first; then each micro-batch passes
its slopes back. The graphs of the last micro-batches are kept from scoring, the others are run again: so memory is that
of a few micro-batches however many replies a prompt has, and a rollout of so few is run once, for rewards and update
together. Gradients are summed over ranks by hand, in one call per update: every rank makes the same number of updates
whatever it sampled.

Departures: a teacher reply is scored once and not once per sample; the mean is over all pairs of all ranks exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import CheckpointError, DataError
from luthier.core.files import atomic_folder, read_json, write_json
from luthier.distill.discriminator import Discriminator
from luthier.distill.objective import bradley_terry, length_matched, pair_accuracy
from luthier.distill.replies import Duels, Ids, pad_right


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
    """Most sequences of one rank in one forward pass; changes speed and memory, not the result."""
    kept_graphs: int = 2
    """Micro-batches that are not run again to learn from them; changes speed and memory, not the result."""
    length_tolerance: float | None = None
    """Learn only from pairs whose lengths differ by at most this much in |ln ratio|; None: from all."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round."""
    centering: float = 0.0
    """Weight of the squared sum of a pair's scores."""
    checkpoint_activations: bool = False
    """Less memory, about a third more time."""


class Scored(NamedTuple):
    """Replies as the discriminator sees them before it learns from them."""

    scores: tuple[Tensor, Tensor]
    """Of the student replies (N,) and of the teacher replies (P,), in fp32 and without a gradient."""
    batches: list[tuple[list[int], Tensor | None]]
    """Micro-batches: rows of all N + P sequences, and their scores with a graph, where it was kept."""


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
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )

    def scores(self, duels: Duels) -> tuple[Tensor, Tensor]:
        """Scores of the student replies (N,) and of the teacher replies (P,), in fp32 and without a gradient."""
        return self._score(duels, 0).scores

    def scored(self, duels: Duels) -> Scored:
        """The same scores, with the graphs of `kept_graphs` micro-batches for the update that follows."""
        return self._score(duels, self.settings.kept_graphs)

    @torch.no_grad()
    def rises(self, duels: Duels) -> tuple[Tensor, Tensor]:
        """What the score rises by at each token of the student replies, and where these tokens are: both (N, T).

        A reply's rises add up to its score minus that of its prompt alone. The mask is right of nothing but zeros.
        """
        longest = max(map(len, duels.students))
        rises = torch.zeros(len(duels.students), longest, device=self.accelerator.device)
        mask = torch.arange(longest, device=rises.device) < duels.student_lengths.to(rises.device)[:, None]
        sequences = duels.sequences()[: len(duels.students)]
        for rows in micro_batches(sequences, self.settings.micro_batch_size):
            batch = pad_right([sequences[row] for row in rows], rises.device)
            with self.accelerator.autocast():
                scores = self.discriminator.prefixes(batch["input_ids"])
            for row, found in zip(rows, scores, strict=True):
                prompt, reply = sequences[row]
                rises[row, : len(reply)] = found[len(prompt) - 1 :][: len(reply) + 1].diff()
        return rises, mask

    def update(self, duels: Duels, scored: Scored | None = None) -> dict[str, float]:
        """One step on all pairs of all ranks. `scored` is of `self.scored`, if the weights did not move since.

        Returns the loss in nats per pair, the share of pairs used and the gradient's norm before clipping, over ranks.
        """
        scored = scored or self.scored(duels)
        student, teacher = (side.detach().requires_grad_() for side in scored.scores)
        loss, used = self._loss(student, teacher, duels)
        slopes = torch.cat(torch.autograd.grad(loss, [student, teacher]))
        totals = self._sum(torch.stack([loss.detach(), used, used.new_tensor(len(duels.students))]))
        pairs = float(totals[1])
        if pairs == 0:  # on all ranks together, so none of them waits for another
            return {"loss": float("nan"), "used": 0.0, "grad_norm": float("nan")}
        sequences, slopes = duels.sequences(), slopes / pairs
        for rows, kept in scored.batches:
            found = self._forward([sequences[row] for row in rows]) if kept is None else kept
            (found * slopes[rows]).sum().backward()
        norm = self._step()
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

    def _score(self, duels: Duels, kept: int) -> Scored:
        """All sequences in micro-batches, those of similar length together; the last `kept` with their graphs."""
        sequences = duels.sequences()
        batches = micro_batches(sequences, self.settings.micro_batch_size)
        flat = torch.zeros(len(sequences), device=self.accelerator.device)
        found = list[tuple[list[int], Tensor | None]]()
        for number, rows in enumerate(batches):
            keep = len(batches) - number <= kept
            with torch.set_grad_enabled(keep):
                scored = self._forward([sequences[row] for row in rows])
            flat[rows] = scored.detach()
            found.append((rows, scored if keep else None))
        return Scored((flat[: len(duels.students)], flat[len(duels.students) :]), found)

    def _forward(self, sequences: list[tuple[Ids, Ids]]) -> Tensor:
        batch = pad_right(sequences, self.accelerator.device)
        with self.accelerator.autocast():  # padding comes after all that counts, so nothing need be masked
            scored: Tensor = self.discriminator(batch["input_ids"], None, batch["last"])
        return scored

    def _step(self) -> float:
        """Sum the gradients over ranks, clip, update."""
        if self.accelerator.num_processes > 1:
            flat = self._sum(torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]))
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
            optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(optimizer)  # puts it where the parameters are
        except (OSError, RuntimeError, ValueError, DataError) as error:
            raise CheckpointError(
                f"{folder}: the discriminator of this checkpoint cannot be read ({str(error).splitlines()[0]})",
                hint="resume from an earlier checkpoint, or start the run again",
            ) from error
        self.updates = int(state["updates"])
        return state


def micro_batches(sequences: Sequence[tuple[Ids, Ids]], most: int) -> list[list[int]]:
    """Places of all sequences, sorted by length, in as few batches of at most `most` as there can be, about equal."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row][0]) + len(sequences[row][1]))
    size = math.ceil(len(order) / math.ceil(len(order) / most))
    return [order[start : start + size] for start in range(0, len(order), size)]
