"""Matrices with one input and one transform (q, k, v; gate, up) rotate it once and multiply it once.

The first of them that is called with an input computes for all; the others, called with the same tensor, take their
parts. An input is recognised by identity and by its count of in-place changes, so a part is never out of date.

Channel scales are not folded into the norm before shared matrices, though that would be exact: kernels multiply by them
while they read the input, and a call without any rounds takes 4 µs for 1024 channels on a CPU, one with eight 10.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from luthier.quantize.experts import RotatedExperts
from luthier.quantize.head import use_int8_head
from luthier.quantize.kernels.dispatch import Runner
from luthier.quantize.linear import RotatedLinear

PATIENCE = 3  # inputs in a row that a member may leave unused before it leaves


class _Pending:
    """Outputs for one input that are not all taken yet."""

    def __init__(self, x: Tensor, parts: dict[int, Tensor]) -> None:
        self.input, self.version, self.parts = weakref.ref(x), x._version, parts


class SharedProduct:
    """The common product of several modules.

    A module that does not get the others' input, though its transform is equal, leaves after a few calls. Between
    threads at worst a product is computed again.
    """

    def __init__(self, members: Sequence[RotatedLinear]) -> None:
        self._runners: dict[torch.dtype, Runner] = {}
        self._join(members)

    def _join(self, members: Sequence[RotatedLinear]) -> None:
        self.members, self._pending, self._unused = tuple(members), None, Counter[int]()
        self._runners.clear()
        for member in self.members:
            member.shared = self

    _pending: _Pending | None

    def runner(self, dtype: torch.dtype) -> Runner:
        """The kernels of all members' rows."""
        if dtype not in self._runners:
            weights = [member.quantized_weight() for member in self.members]
            self._runners[dtype] = Runner(weights, [member.stored() for member in self.members], dtype)
        return self._runners[dtype]

    @torch.no_grad()
    def take(self, member: RotatedLinear, x: Tensor) -> Tensor:
        """The product of a member, without bias, for x (…, in_features)."""
        if x.is_inference():  # these do not count their changes
            return member.multiply(x)
        pending = self._pending
        if pending is not None and pending.input() is x and pending.version == x._version:
            part = pending.parts.pop(id(member), None)
            if not pending.parts:
                self._pending = None
            return member.multiply(x) if part is None else part
        if pending is not None:
            self._unused.update(pending.parts.keys())
            late = [other for other in self.members if self._unused[id(other)] >= PATIENCE]
            if late:
                self._leave(late)
                return member(x) if member.bias is None else member.multiply(x)
        return self._compute(member, x)

    def _compute(self, member: RotatedLinear, x: Tensor) -> Tensor:
        y = self.runner(x.dtype)(x.reshape(-1, member.in_features))
        widths = [other.out_features for other in self.members]
        shape = x.shape[:-1]
        parts = {
            id(other): part.reshape(*shape, -1) if len(y) == 1 else part.contiguous().view(*shape, -1)
            for other, part in zip(self.members, y.split(widths, 1), strict=True)
        }
        own = parts.pop(id(member))
        self._pending = _Pending(x, parts)
        return own

    def _leave(self, late: Sequence[RotatedLinear]) -> None:
        for member in late:
            member.shared = None
        rest = [member for member in self.members if member not in late]
        if len(rest) > 1:
            self._join(rest)
        else:
            self.dissolve()

    def dissolve(self) -> None:
        """Every member multiplies alone from now on."""
        for member in self.members:
            member.shared = None
        self._pending = None
        self._runners.clear()


def prepare(model: nn.Module, head_bits: int = 16) -> str:
    """Pack the weights of all quantized modules for the kernels of their device, and let siblings share.

    Call it once the weights are loaded. The line that it returns says which kernels run, and why. `head_bits` 8 adds
    an 8-bit copy of the output head, see `head`.
    """
    used = Counter[tuple[str, str, str]]()
    merged = 0
    head = f"; {use_int8_head(model)}" if head_bits == 8 else ""
    for parent in model.modules():
        if isinstance(parent, RotatedExperts):
            parent.forget()
            used.update(describe(runner) for runner in parent.runners(parent.dtype))
        for group in siblings(parent):
            for member in group:
                member.forget()
            runner = (SharedProduct(group) if len(group) > 1 else group[0]).runner(group[0].dtype)
            used[describe(runner)] += 1
            merged += len(group) if len(group) > 1 else 0
    if not used:
        return f"no quantized modules{head}"
    products = "; ".join(f"{count} x {product} ({why}), {rotation}" for (product, why, rotation), count in used.items())
    return f"quantized products: {products}; {merged} modules share their rotation with siblings{head}"


def describe(runner: Runner) -> tuple[str, str, str]:
    """Product, reason and rotation of a runner, in words."""
    choice = runner.choice
    if choice.few == choice.many or not choice.limit:
        return choice.many, choice.reason, runner.rotation_name
    return f"{choice.few} up to {choice.limit} rows, then {choice.many}", choice.reason, runner.rotation_name


def siblings(parent: nn.Module) -> Iterator[list[RotatedLinear]]:
    """The quantized children of a module, those with bitwise equal transforms together."""
    groups = list[list[RotatedLinear]]()
    for child in parent.children():
        if isinstance(child, RotatedLinear):
            group = next((group for group in groups if _alike(group[0], child)), None)
            if group is None:
                groups.append([child])
            elif child not in group:
                group.append(child)
    yield from groups


def _alike(a: RotatedLinear, b: RotatedLinear) -> bool:
    settings = [(m.in_features, m.bits, m.group_size, m.rounds, m.dtype, m.qweight.device) for m in (a, b)]
    pairs = ((a.channel_scales, b.channel_scales), (a.pairs, b.pairs), (a.theta, b.theta))
    return settings[0] == settings[1] and all(torch.equal(x, y) for x, y in pairs)
