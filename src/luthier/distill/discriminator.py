"""The discriminator of GAD, arXiv 2511.10643 section 2.1: the student's network with one number as its output.

A linear layer reads the final hidden state at the last token of the reply. That place is given by its index and never
searched by the id of the padding, which is often also the end token. The score is unbounded and in fp32.

Departures: the head starts from a seed, and has no bias: differences cancel it, so that its gradient is rounding noise,
of which Adam would make whole steps. The network is in evaluation mode always, so that no dropout parts the scores
that reward the student from those that the update starts from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_folder
from luthier.core.seeds import derive_seed
from luthier.models.load import load_pretrained, write_provenance

HEAD = "discriminator_head.safetensors"
HEAD_STD = 0.02


class Discriminator(nn.Module):
    """D([prompt, reply]) -> a real number: the base of any Hugging Face causal language model, and a linear head."""

    def __init__(self, backbone: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.get_text_config().hidden_size, 1, bias=False)
        generator = torch.Generator().manual_seed(derive_seed(seed, "discriminator head"))
        with torch.no_grad():
            self.head.weight.normal_(0, HEAD_STD, generator=generator)
        self.eval()

    @classmethod
    def of(cls, model: PreTrainedModel, *, seed: int = 0) -> Discriminator:
        """A discriminator that starts from a copy of a causal language model's weights, in fp32."""
        return cls(copy.deepcopy(cast("PreTrainedModel", model.base_model)).float(), seed=seed).to(model.device)

    def checkpoint_activations(self) -> None:
        """Recompute the activations of each block in the backward pass. The blocks alone count as training for it."""
        self.backbone.activation_checkpointing_enable({"use_reentrant": False})
        for module in self.backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, last: Tensor) -> Tensor:
        """Scores (B,) in fp32 of rows (B, T) whose last reply token stands at `last` (B,); padding on either side.

        Without a mask, padding must be on the right.
        """
        hidden = self._hidden(input_ids, attention_mask)
        return self._score(hidden[torch.arange(len(last), device=last.device), last])

    def prefixes(self, input_ids: Tensor) -> Tensor:
        """Scores (B, T) in fp32 of everything up to each token of rows (B, T), padded on the right."""
        return self._score(self._hidden(input_ids, None))

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        return (hidden.float() * self.head.weight).sum(-1)  # a linear layer that autocast leaves in fp32


def save_discriminator(
    discriminator: Discriminator,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    provenance: Mapping[str, Any],
) -> None:
    """Write a model folder, complete or absent: the base network as `AutoModel` reads it, and the head beside it."""
    with atomic_folder(folder) as temporary:
        discriminator.backbone.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in discriminator.head.state_dict().items()}
        save_file(head, temporary / HEAD)
        write_provenance(temporary, provenance)


def load_discriminator(folder: Path, *, device: torch.device | str = "cpu") -> Discriminator:
    """Read a folder that `save_discriminator` wrote, in fp32. CheckpointError when it is damaged or none."""
    if not (folder / HEAD).exists():
        raise CheckpointError(
            f"{folder}: this is no discriminator, {HEAD} is missing",
            hint="give the folder that a warm-up wrote beside its model",
        )
    backbone = load_pretrained(folder, dtype=torch.float32, auto=AutoModel)
    discriminator = Discriminator(backbone)
    try:
        discriminator.head.load_state_dict(load_file(folder / HEAD))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / HEAD}: the head does not fit config.json", hint="both belong to one folder; copy it again"
        ) from error
    return discriminator.to(device)
