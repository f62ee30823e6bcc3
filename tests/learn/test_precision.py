from __future__ import annotations

import torch
from torch import nn

from luthier.learn.precision import Weights


def test_gradients_of_micro_batches_add_up_in_fp32():
    """Many small bf16 gradients would vanish in a bf16 sum: 256 + 1 is 256 there."""
    module = nn.Linear(1, 1, bias=False)
    weights = Weights(module, torch.bfloat16)
    for gradient in [256.0, *[1.0] * 64]:
        module.weight.grad = torch.full((1, 1), gradient, dtype=torch.bfloat16)
        weights.collect()
    assert module.weight.grad is None
    assert float(weights.masters["weight"].grad) == 320


def test_small_updates_reach_the_masters_and_then_the_model():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    weights = Weights(module, torch.bfloat16)
    master = weights.masters["weight"]
    for _ in range(100):
        master.data -= 1e-4
        weights.publish()
    assert abs(float(master.detach()) - 0.99) < 1e-5
    assert module.weight.dtype == torch.bfloat16
    assert abs(float(module.weight.detach()) - 0.99) < 4e-3


def test_restore_gives_the_module_its_exact_masters():
    module = nn.Linear(3, 2)
    weights = Weights(module, torch.bfloat16)
    weights.masters["weight"].data += 1e-5
    expected = weights.masters["weight"].detach().clone()
    weights.restore()
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, expected)


def test_without_a_low_dtype_the_module_holds_the_masters():
    module = nn.Linear(2, 2)
    weights = Weights(module)
    assert weights.masters["weight"] is module.weight
    weights.collect()
    weights.publish()
    assert module.weight.dtype == torch.float32
