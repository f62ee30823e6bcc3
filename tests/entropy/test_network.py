"""The decoder is causal, sees nothing of the segment but its code, and padding on the right side changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from luthier.core.config import build
from luthier.core.errors import CheckpointError
from luthier.entropy.config import SIZE_PRESETS, EemConfig, TrainEemConfig
from luthier.entropy.network import EntropyModel, load_entropy_model
from luthier.entropy.network_config import EntropyConfig
from luthier.models.load import save_pretrained

KINDS = [
    {"half": "transformer", "intro": "token"},
    {"half": "transformer", "intro": "embedding"},
    {"half": "transformer", "intro": "added"},
    {"half": "transformer", "intro": "token", "padding_side": "left"},
    {"half": "transformer", "intro": "added", "padding_side": "left"},
    {"half": "transformer", "intro": "token", "quantizer": "noise", "levels": 32},
    {"half": "mixer", "intro": "token", "heads": 0},
    {"half": "mixer", "intro": "embedding", "kernel": 4, "heads": 0},
    {"half": "mixer", "intro": "added", "heads": 4},
]
SIZES = {"window": 12, "encoder_width": 16, "decoder_width": 24, "encoder_layers": 1, "decoder_layers": 2}


def kind_name(kind: dict[str, Any]) -> str:
    return "-".join(map(str, kind.values()))


def make(kind: dict[str, Any]) -> EntropyModel:
    """A model with random weights, large enough that everything matters."""
    values = {"vocab_size": 11, "heads": 2, "dims": 3, "levels": 4, **SIZES, **kind}
    torch.manual_seed(0)
    model = EntropyModel(EntropyConfig.of(EemConfig(**values))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(4).add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=KINDS, ids=kind_name)
def model(request: pytest.FixtureRequest) -> EntropyModel:
    return make(request.param)


def ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(1))


def changed(tokens: Tensor, place: int) -> Tensor:
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % 11
    return other


@pytest.mark.parametrize("with_code", [True, False], ids=["code", "null"])
def test_a_token_is_predicted_from_earlier_ones_only(model: EntropyModel, with_code: bool) -> None:
    code = model.encode(ids()) if with_code else None
    before = model.logits(ids(), code)
    for place in range(12):
        after = model.logits(changed(ids(), place), code)
        torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], rtol=1e-5, atol=1e-5)
        if place < 11:
            assert not torch.allclose(after[:, place + 1], before[:, place + 1], atol=1e-3)


def test_logits_have_no_gradient_to_their_own_or_later_tokens(model: EntropyModel) -> None:
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.decoder_tokens.register_forward_hook(keep)
    for place in (0, 5):
        model.logits(ids(), model.encode(ids()))[:, place].square().sum().backward()
        gradient = kept.pop().grad
        nothing = torch.zeros(3, 12, 1) if gradient is None else gradient.abs().sum(-1, keepdim=True)
        assert not nothing[:, place:].any()
        assert bool(nothing[:, :place].any()) == (place > 0)


def test_the_encoder_has_seen_every_token(model: EntropyModel) -> None:
    numbers = model._numbers(ids(), None)
    for place in range(12):
        assert not torch.allclose(model._numbers(changed(ids(), place), None), numbers, atol=1e-4)


def test_the_code_is_all_that_crosses(model: EntropyModel) -> None:
    """With the code held, what the encoder thinks of the segment does not matter."""
    code = model.encode(ids())
    assert code.dtype == torch.int64
    assert code.shape == (3, 3)
    before = model.logits(ids(), code)
    torch.nn.init.normal_(model.down.weight)
    torch.nn.init.normal_(model.encoder_tokens.weight)
    assert torch.equal(model.logits(ids(), code), before)
    assert not torch.allclose(model.logits(ids(), (code + 1) % 4), before, atol=1e-3)
    assert not torch.allclose(model.logits(ids(), None), before, atol=1e-3)


def test_every_token_is_charged_the_first_one_too(model: EntropyModel) -> None:
    code = model.encode(ids())
    log_p = model.logits(ids(), code).log_softmax(-1)
    expected = -log_p.gather(-1, ids()[..., None])[..., 0]
    torch.testing.assert_close(model.nats(ids(), code), expected)
    assert bool((expected[:, 0] > 0).all())
    everything = model.logits(torch.arange(11)[:, None], model.encode(ids())[:1].expand(11, -1))
    torch.testing.assert_close(everything[:, 0].log_softmax(-1).exp().diagonal().sum(), torch.tensor(1.0))


def test_padding_on_the_named_side_changes_nothing(model: EntropyModel) -> None:
    lengths, left = [7, 12, 1], model.eem.padding_side == "left"
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(12 - length, 12) if left else slice(0, length)
        padded[row, place], mask[row, place] = ids()[row, :length], True
    code = model.encode(padded, mask=mask)
    nats = model.nats(padded, code, mask=mask)
    assert not nats[~mask].any()
    for row, length in enumerate(lengths):
        alone = ids()[row : row + 1, :length]
        assert torch.equal(model.encode(alone), code[row : row + 1])
        torch.testing.assert_close(
            nats[row][mask[row]], model.nats(alone, code[row : row + 1])[0], rtol=1e-4, atol=1e-4
        )


def test_padding_on_the_other_side_is_refused(model: EntropyModel) -> None:
    mask = (torch.arange(12) < 5 if model.eem.padding_side == "left" else torch.arange(12) > 5).expand(3, 12)
    for call in (model.encode, lambda tokens, mask: model.nats(tokens, None, mask=mask)):
        with pytest.raises(ValueError, match=f"padding on the {model.eem.padding_side} only"):
            call(ids(), mask=mask)


def test_training_shows_the_decoder_the_code(model: EntropyModel) -> None:
    """With FSQ exactly, with noise up to its width; and the null where a segment goes without."""
    tokens, uniform = ids(), torch.zeros(3, 3)
    replaced = torch.tensor([False, True, False])
    trained = model.lm_head(model.training_hidden(tokens, replaced, uniform))
    torch.testing.assert_close(trained[1], model.logits(tokens, None)[1])
    if model.eem.quantizer == "fsq":
        torch.testing.assert_close(trained[0], model.logits(tokens, model.encode(tokens))[0])
    else:
        noisy = model.lm_head(model.training_hidden(tokens, replaced, uniform + 0.9))
        assert not torch.allclose(noisy[0], trained[0], atol=1e-4)
    trained[0].sum().backward()
    assert model.down.weight.grad is not None
    assert bool(model.down.weight.grad.any())


def test_a_folder_gives_the_same_model_back(model: EntropyModel, tmp_path: Path) -> None:
    save_pretrained(model, None, tmp_path / "model", {})
    for loaded in (load_entropy_model(tmp_path / "model"), AutoModel.from_pretrained(tmp_path / "model")):
        assert isinstance(loaded, EntropyModel)
        assert loaded.eem == model.eem
        assert loaded.code_bits == model.code_bits
        code = loaded.encode(ids())
        assert torch.equal(code, model.encode(ids()))
        assert torch.equal(loaded.nats(ids(), code), model.nats(ids(), code))
        assert torch.equal(loaded(ids(), code=code).logits, model.logits(ids(), code))


def test_what_is_no_code_is_refused() -> None:
    model = make(KINDS[0])
    numbers = model._numbers(ids(), None)
    with pytest.raises(ValueError, match=r"code: got torch\.float32"):  # what the encoder says before it is quantized
        model.nats(ids(), numbers)
    with pytest.raises(ValueError, match="numbers outside 0 to 3"):
        model.logits(ids(), torch.full((3, 3), 4))
    with pytest.raises(ValueError, match="expected int64"):
        model.logits(ids(), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \(B, 1 to 12\)"):
        model.nats(torch.zeros(1, 13, dtype=torch.long), None)


def test_another_kind_of_model_is_no_entropy_estimation_model(tmp_path: Path) -> None:
    llama = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, bos_token_id=1
    )
    LlamaForCausalLM(llama).base_model.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="not an entropy-estimation model but a LlamaModel"):
        load_entropy_model(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_entropy_model(tmp_path / "nowhere")


@pytest.mark.parametrize("size", SIZE_PRESETS)
def test_every_size_is_a_model(size: str) -> None:
    config = build(TrainEemConfig, {"size": size})
    with torch.device("meta"):
        model = EntropyModel(EntropyConfig.of(config.architecture(8000)))
    if size == "paper":  # 16 x (4.19 M + 1.05 M) and three tables: the published model without its unused table
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(94.1e6, rel=0.005)
        assert model.code_bits == 256
