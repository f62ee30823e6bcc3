"""Ranks: one process without any environment variable, or many under torchrun with FSDP2 (and HSDP) sharding."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from luthier.core.errors import ConfigError, UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a lost rank becomes an error, not a hang
PATIENCE = datetime.timedelta(days=7)  # for work that one rank does for all, such as reading a corpus


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many, on which device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_parallel: int = 1
    """Ranks that compute each row together, T/p tokens each; neighbors form a group, and groups share the rows."""

    def __post_init__(self) -> None:
        if self.sequence_parallel < 1 or self.world_size % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel: got {self.sequence_parallel}, which does not divide the {self.world_size} ranks",
                hint="start a multiple of it with torchrun --nproc-per-node, or use 1",
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the rows this process reads, of `data_size`."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """Shares into which the rows of a batch are divided."""
        return self.world_size // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """Which of the `sequence_parallel` parts of each row it computes."""
        return self.rank % self.sequence_parallel

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """A block in which the main rank works for all: the others wait, however long, and stop when it fails."""
        if self.world_size == 1:
            yield
            return
        group, failed = dist.new_group(backend="gloo", timeout=PATIENCE), torch.ones(())
        try:
            yield
            failed.zero_()
        finally:
            dist.all_reduce(failed, group=group)
        if failed:
            raise UserError("stopped, because another rank failed", hint="its own message says why")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this launch. Under torchrun the outermost one joins the process group and leaves it."""
    chosen = choose_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(device=chosen)
        return
    if chosen.type == "cuda":
        chosen = _own_gpu(chosen)
    outermost = not dist.is_initialized()  # a second joining would wait for the addresses of the first
    if outermost:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
        if outermost:
            dist.barrier()  # a rank that leaves while another still talks to it can abort that one
    finally:
        if outermost:
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is a GPU where there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, expected cpu, cuda or auto", hint="leave it at auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ConfigError(
            f"device: got {name!r}, but torch sees {seen} CUDA device{'s' * (seen not in ('no', 1))}",
            hint="use --device cpu or auto",
        )
    return device


def _own_gpu(asked: torch.device) -> torch.device:
    """The GPU of this rank, which becomes the current one."""
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if asked.index is not None or local >= count:
        raise ConfigError(
            f"device: got {asked}, but under torchrun every rank takes a GPU of its own, and this is rank {local} of "
            f"the machine, which has {count}",
            hint="use --device cuda, and at most as many processes as GPUs",
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def make_mesh(who: Ranks, shard_size: int = 0) -> DeviceMesh:
    """All ranks in one sharding group, or HSDP: groups of `shard_size` ranks that hold replicas of each other."""
    if shard_size in (0, who.world_size):
        return init_device_mesh(who.device.type, (who.world_size,), mesh_dim_names=("shard",))
    if who.world_size % shard_size:
        raise ConfigError(
            f"shard_size: got {shard_size}, which does not divide the {who.world_size} ranks",
            hint="use a divisor, usually the number of GPUs in a node, or 0 to shard over all ranks",
        )
    shape = (who.world_size // shard_size, shard_size)
    return init_device_mesh(who.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(objective: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """FSDP2: every block its own unit, then the rest; parameters stay fp32 masters, compute runs in `low`.

    Gradients are reduced in fp32 and averaged over ranks; the loop undoes the average, because its losses are sums.
    Inputs keep their dtype, as in one process: rounding the cosines and sines of RoPE would move far positions.
    """
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face decoder: the longest ModuleList in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
