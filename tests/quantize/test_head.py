"""The 8-bit head: close to the head, the same parameters, never stale."""

import torch
from torch import nn

from luthier.quantize.head import MAX_ROWS, Int8Head
from luthier.quantize.sharing import prepare


@torch.no_grad()
def test_close_to_the_head_and_follows_its_weight() -> None:
    linear = nn.Linear(64, 96, bias=True).bfloat16()
    head = Int8Head(linear)
    assert head.state_dict().keys() == linear.state_dict().keys()
    for shape in [(64,), (1, 1, 64), (MAX_ROWS + 1, 64), (0, 64)]:
        x = torch.randn(shape).bfloat16()
        assert torch.allclose(head(x).float(), linear(x).float(), atol=0.05, rtol=0.02)
    linear.weight.mul_(-2)
    assert torch.allclose(head(x := torch.randn(1, 64).bfloat16()).float(), linear(x).float(), atol=0.1, rtol=0.02)


def test_gradients_and_what_prepare_says() -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(64, 96).bfloat16()
    assert "head in 8 bits" in prepare(model, head_bits=8)
    x = torch.randn(1, 64).bfloat16().requires_grad_()
    model.lm_head(x).sum().backward()
    assert x.grad is not None
    assert "was not used" in prepare(nn.Module(), head_bits=8)
