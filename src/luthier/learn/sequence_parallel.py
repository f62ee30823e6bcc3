"""Sequence parallelism by all-to-all over heads (Ulysses), as in Instella-Long, arXiv 2511.10628 (spec: section 4.3).

Each of p ranks holds T/p consecutive tokens of every row. Only attention needs the others: an all-to-all turns
(all heads, T/p tokens) into (H/p heads, all tokens), an ordinary kernel runs, and the reverse all-to-all follows.
Norms, MLP and loss are local, so Instella's norm of queries and keys over all heads needs no communication.

Models are not changed: the kernel is one of transformers' attention functions, under a name of its own, and a hook
gives each rank the positions of its tokens. Targets are shifted before rows are cut, so that none is lost between two
ranks, and the loop divides by their number over all ranks; the reference code loses p - 1 targets of each row.

Torch's own `context_parallel` was tried first: it has no kernel for CPUs, and with SDPA no document masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.core.errors import ConfigError
from luthier.learn.parallel import Ranks

NAME = "ulysses"  # among transformers' attention functions
KERNELS = ("sdpa", "flex_attention")  # those that take document masks
WHOLE = ("document_ids",)  # what a rank needs of all tokens of its rows, for the kernel's mask


class _Exchange(torch.autograd.Function):
    """All-to-all: cut along one dimension, send a part to each rank, join what comes along another dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        return _all_to_all(x, cut, join, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.join, ctx.cut, ctx.group), None, None, None


def _all_to_all(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    sent = torch.stack(x.chunk(group.size(), cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), join)


@torch.compiler.disable  # collectives of a compiled block would have to be functional ones
def exchange(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Differentiable all-to-all over `group`: dimension `cut` shrinks by its size, `join` grows by it."""
    exchanged: Tensor = _Exchange.apply(x, cut, join, group)
    return exchanged


class Ulysses:
    """An attention function for transformers that exchanges tokens for heads around a kernel."""

    def __init__(self, kernel: str, group: dist.ProcessGroup) -> None:
        self.kernel, self.group = kernel, group

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        row_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, T/p, E), key and value (B, K, T/p, E) -> (B, T/p, H, E).

        `row_mask` is the kernel's mask for whole rows. ValueError for a mask of the rank's own tokens, and for layers
        that see a window only. The kernel gets no `position_ids`, in which it would look for borders of documents.
        """
        if attention_mask is not None or kwargs.get("sliding_window") is not None:
            raise ValueError("sequence parallelism takes neither padding masks nor sliding windows")
        query = exchange(query, 1, 2, self.group)  # (B, H/p, T, E)
        key, value = exchange(torch.cat((key, value), -1), 1, 2, self.group).split([key.shape[-1], value.shape[-1]], -1)
        attend = ALL_ATTENTION_FUNCTIONS[self.kernel]
        output, _ = attend(module, query, key, value, row_mask, **kwargs)  # (B, T, H/p, E)
        return exchange(output, 1, 2, self.group), None

    def row_mask(self, rows: int, tokens: int, document_ids: Tensor | None, device: torch.device) -> Any:
        """The kernel's mask for whole rows (B, T), inside their documents; None where causal is all there is to say."""
        if document_ids is None and self.kernel == "sdpa":
            return None
        same = () if document_ids is None else (packed_sequence_mask_function(document_ids),)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.kernel](
            batch_size=rows,
            q_length=tokens,
            kv_length=tokens,
            mask_function=and_masks(causal_mask_function, *same),
            allow_is_causal_skip=False,
            device=device,
        )


def parallelize(model: PreTrainedModel, who: Ranks) -> None:
    """Make the decoder compute on T/p tokens of each row, with the others of its sequence group; all ranks call it.

    It then takes input_ids (B, T/p), and document_ids of whole rows (B, T). The kernel is the one that is set now.
    Raises: ConfigError when p does not divide the heads, or the model's attention cannot be exchanged.
    """
    if who.sequence_parallel == 1:
        return
    check_heads(model, who.sequence_parallel)
    kernel = model.config._attn_implementation
    if kernel not in KERNELS or not model._supports_attention_backend:
        raise ConfigError(
            f"sequence_parallel: {type(model).__name__} with {kernel} attention cannot be split",
            hint="use --attention sdpa or flex_attention, and a model with ordinary attention",
        )
    shape = (who.data_size, who.sequence_parallel)
    mesh = init_device_mesh(who.device.type, shape, mesh_dim_names=("data", "sequence"))
    ulysses = Ulysses(kernel, mesh["sequence"].get_group())
    ALL_ATTENTION_FUNCTIONS.register(NAME, ulysses)
    model.set_attn_implementation(NAME)

    def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        input_ids, documents = kwargs["input_ids"], kwargs.pop("document_ids", None)
        if kwargs.get("position_ids") is None:
            own = torch.arange(input_ids.shape[1], device=input_ids.device) + who.sequence_rank * input_ids.shape[1]
            kwargs["position_ids"] = own[None]
        elif documents is None:
            raise ValueError("position_ids alone would mean packed rows, whose documents must be given: document_ids")
        if model.config._attn_implementation != NAME:
            raise ValueError(f"a model made parallel has {NAME} attention, got {model.config._attn_implementation}")
        rows, tokens = input_ids.shape
        kwargs["row_mask"] = ulysses.row_mask(rows, tokens * who.sequence_parallel, documents, input_ids.device)
        return args, kwargs

    model.base_model.register_forward_pre_hook(place, with_kwargs=True)


def check_heads(model: PreTrainedModel, ranks: int) -> None:
    """ConfigError unless the heads, and those of keys and values, can be divided among so many ranks."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    key_value = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or key_value % ranks:
        raise ConfigError(
            f"sequence_parallel: got {ranks}, which does not divide the {heads} heads ({key_value} of keys and values)",
            hint="use a common divisor of both",
        )


def own_tokens(batch: Mapping[str, NDArray[Any]], who: Ranks) -> dict[str, NDArray[Any]]:
    """What of a batch of whole rows (B, T) this rank computes: its T/p consecutive tokens, and all documents.

    Raises: ConfigError when p does not divide T.
    """
    ranks, length = who.sequence_parallel, batch["input_ids"].shape[1]
    if ranks == 1:
        return dict(batch)
    if length % ranks:
        raise ConfigError(
            f"sequence_parallel: got {ranks}, which does not divide rows of {length} tokens",
            hint="use a divisor of sequence_length",
        )
    size = length // ranks
    own = slice(who.sequence_rank * size, (who.sequence_rank + 1) * size)
    return {name: array if name in WHOLE else array[:, own] for name, array in batch.items()}
