"""One rank of test_sequence_parallel: every case on all gloo ranks against one process, as one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.errors import ConfigError
from luthier.learn.evaluate import stream_nll
from luthier.learn.objectives import IGNORED, CausalLoss
from luthier.learn.parallel import Ranks
from luthier.learn.sequence_parallel import own_tokens, parallelize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

ROWS, LENGTH, VOCABULARY = 2, 16, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CASES = {
    "plain": {},
    "documents": {"documents": True},
    "ignored targets": {"documents": True, "ignored": True},
    "positions": {"documents": True, "positions": True},
    "checkpointing": {"checkpointing": True},
    "compiled": {"documents": True, "compiled": True},
    "llama": {"llama": True},
    "llama with documents": {"llama": True, "documents": True},
}


def objective(*, llama: bool = False, checkpointing: bool = False, compiled: bool = False) -> CausalLoss:
    torch.manual_seed(1)
    shape = SHAPE | {"num_hidden_layers": 1 if compiled else 2}
    config = LlamaConfig(**shape) if llama else InstellaConfig(**shape)
    model = (LlamaForCausalLM if llama else InstellaForCausalLM)._from_config(config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that attention is far from uniform
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for block in model.model.layers:
            block.compile(backend="eager")  # traced, not generated
    model.train()
    return CausalLoss(model, plain_head=True)


def rows(*, documents: bool, ignored: bool, positions: bool) -> dict[str, np.ndarray]:
    """Whole rows, whose targets are shifted before anything is cut; document borders lie on and off rank borders."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    batch = {"input_ids": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
    if documents:
        batch["document_ids"] = np.array([[0] * 3 + [1] * 5 + [2] * 8, [0] * 7 + [1] * 9])
    if positions:
        batch["position_ids"] = np.cumsum(rng.integers(1, 3, (ROWS, LENGTH)), 1)
    if ignored:  # one rank of four has no target at all
        batch["targets"][:, 4:8] = IGNORED
    return batch


def documents_apart(single: CausalLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of each token (B, T) where every document has a forward pass of its own, in one process."""
    documents = batch.get("document_ids", torch.zeros_like(batch["targets"]))
    positions = batch.get("position_ids", torch.arange(LENGTH).expand(ROWS, -1))
    losses = torch.zeros(batch["targets"].shape)
    for row, ids in enumerate(documents):
        for document in ids.unique():
            place = (row, ids == document)
            # A mask of ones says that skips in the positions are no borders.
            logits = single.model(
                input_ids=batch["input_ids"][place][None],
                position_ids=positions[place][None],
                attention_mask=torch.ones(1, int(place[1].sum())),
                use_cache=False,
            ).logits[0]
            targets = batch["targets"][place]
            losses[place] = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return losses


def compare(who: Ranks, *, documents: bool = False, ignored: bool = False, positions: bool = False, **kind: Any) -> Any:
    """Largest differences from one process: in the loss of each token, their sum, and every gradient."""
    batch = rows(documents=documents, ignored=ignored, positions=positions)
    whole = {name: torch.from_numpy(array) for name, array in batch.items()}
    own = {name: torch.from_numpy(array) for name, array in own_tokens(batch, who).items()}
    single, shared = objective(**kind), objective(**kind)
    parallelize(shared.model, who)
    with torch.no_grad():
        expected = documents_apart(single, whole)
        mine = shared(**own, per_token=True)
        parts = [torch.empty_like(mine) for _ in range(who.world_size)]
        dist.all_gather(parts, mine)
    targets = who.sum([int((own["targets"] != IGNORED).sum())])[0]
    loss = documents_apart(single, whole).sum() / int((whole["targets"] != IGNORED).sum())
    loss.backward()
    part = shared(**own) / targets
    part.backward()
    total = who.sum([float(part.detach())])[0]
    gradients = []
    for alone, together in zip(single.parameters(), shared.parameters(), strict=True):
        dist.all_reduce(together.grad)
        gradients.append(float((alone.grad - together.grad).abs().max() / alone.grad.abs().max()))
    return {
        "targets": [targets, int((whole["targets"] != IGNORED).sum())],
        "tokens": float((torch.cat(parts, 1) - expected).abs().max()),
        "loss": abs(total - float(loss.detach())),
        "gradients": max(gradients),
    }


def scored(who: Ranks) -> float:
    """Largest difference in the code length of a stream, whose last window is not full."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 53)
    settings = {"start_token": 0, "context": 16, "stride": 8, "batch_size": 2}
    single, shared = objective(), objective()
    parallelize(shared.model, who)
    alone = stream_nll(single, tokens, who=Ranks(), document_starts=np.array([0, 9, 30]), **settings)
    together = stream_nll(shared, tokens, who=who, document_starts=np.array([0, 9, 30]), **settings)
    return float(np.abs(alone - together).max())


def refused(who: Ranks) -> str:
    torch.manual_seed(0)
    model = InstellaForCausalLM._from_config(InstellaConfig(**SHAPE | {"num_attention_heads": 1}))
    try:
        parallelize(model, who)
    except ConfigError as error:
        return str(error)
    return "not refused"


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    who = Ranks(dist.get_rank(), dist.get_world_size(), sequence_parallel=dist.get_world_size())
    # Tracing takes long.
    cases = {name: case for name, case in CASES.items() if who.world_size == 2 or name != "compiled"}
    found: dict[str, Any] = {name: compare(who, **case) for name, case in cases.items()}
    found["scored"], found["refused"] = scored(who), refused(who)
    if who.world_size == 4:
        halves = Ranks(who.rank, who.world_size, sequence_parallel=2)
        found["scored by two groups"] = scored(halves)
    if who.rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
