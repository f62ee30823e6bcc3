from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from luthier.core.errors import ConfigError
from luthier.learn.parallel import Ranks, choose_device, make_mesh, ranks, shard, transformer_blocks


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


class Block(nn.Module):
    """Remembers the dtypes that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.seen = [self.linear.weight.dtype, *(part.dtype for part in rotation)]
        return self.linear(x)


def test_blocks_compute_in_bf16_but_rotate_in_fp32(alone: Ranks) -> None:
    block = Block()
    shard(nn.Sequential(block), [block], make_mesh(alone), torch.bfloat16)
    block(torch.zeros(1, 4, dtype=torch.bfloat16), rotation=(torch.zeros(4), torch.zeros(4)))
    assert block.seen == [torch.bfloat16, torch.float32, torch.float32]


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard_size: got 3, which does not divide the 4 ranks"):
        make_mesh(Ranks(world_size=4), 3)


@pytest.mark.parametrize(("name", "told"), [("gpu", "expected cpu, cuda or auto"), ("cuda:99", "torch sees")])
def test_a_device_that_is_not_there_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"device: got '{name}', .*{told}"):
        choose_device(name)
    with pytest.raises(ConfigError), ranks(name):
        pass


def test_blocks_are_the_longest_list() -> None:
    blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert transformer_blocks(nn.ModuleDict({"few": nn.ModuleList([nn.Linear(1, 1)]), "many": blocks})) == list(blocks)
    assert transformer_blocks(nn.Linear(1, 1)) == []
