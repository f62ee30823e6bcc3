"""The masked mixer is the published one: a masked convolution over tokens, causal, saved and loaded as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from luthier.core.errors import ConfigError
from luthier.learn.objectives import has_plain_head, is_causal
from luthier.models.load import load_pretrained, save_pretrained
from luthier.models.mixer import MixerForCausalLM, MixerTokens, mix_tokens
from luthier.models.mixer_config import MixerConfig

SHAPES = [(1, 0), (4, 0), (3, 0), (1, 4), (4, 2)]  # kernel, heads


def config(kernel: int = 1, heads: int = 0) -> MixerConfig:
    return MixerConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        max_position_embeddings=12,
        kernel_size=kernel,
        num_heads=heads,
    )


def model(kernel: int = 1, heads: int = 0) -> MixerForCausalLM:
    torch.manual_seed(0)
    return MixerForCausalLM(config(kernel, heads)).eval()


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(1))


def masked_convolution(weight: Tensor, bias: Tensor) -> nn.Conv1d:
    """The published form: a convolution whose channels are the tokens, with padding "same", masked weights."""
    length, _, kernel = weight.shape
    convolution = nn.Conv1d(length, length, kernel, padding="same")
    mask = torch.ones(length, length).tril()[..., None]
    convolution.load_state_dict({"weight": weight * mask, "bias": bias})
    return convolution


@pytest.mark.parametrize(("kernel", "heads"), SHAPES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_mixing_is_a_masked_convolution_over_tokens(kernel: int, heads: int) -> None:
    torch.manual_seed(kernel)
    layer, x = MixerTokens(config(kernel, heads)), torch.randn(3, 12, 16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    parts = layer.in_proj(x).chunk(max(1, heads), dim=-1)
    mixed = [
        masked_convolution(weight, bias)(part)
        for weight, bias, part in zip(layer.weight, layer.bias, parts, strict=True)
    ]
    torch.testing.assert_close(layer(x, torch.ones(12, 12).tril()), layer.out_proj(torch.cat(mixed, dim=-1)))


def test_kernel_one_is_a_triangular_matrix_product() -> None:
    weight, x, bias = torch.randn(1, 5, 5, 1), torch.randn(2, 1, 5, 7), torch.randn(1, 5)
    expected = weight[0, :, :, 0].tril() @ x[:, 0] + bias[0, :, None]
    masked = weight[..., 0].tril()[..., None]
    torch.testing.assert_close(mix_tokens(x, masked, bias)[:, 0], expected)


@pytest.mark.parametrize(("kernel", "heads"), SHAPES)
def test_no_position_sees_a_later_token(kernel: int, heads: int) -> None:
    mixer = model(kernel, heads)
    before = mixer(ids()).logits
    for changed in range(12):
        other = ids()
        other[:, changed] = (other[:, changed] + 1) % 23
        after = mixer(other).logits
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, changed], before[:, changed])


def test_masked_weights_get_no_gradient() -> None:
    mixer = model(kernel=4, heads=2)
    mixer(ids(), labels=ids()).loss.backward()
    gradient = mixer.model.layers[0].mixer.weight.grad
    assert gradient is not None
    above = torch.ones(12, 12).triu(1).bool()
    assert not gradient[:, above].any()
    assert gradient[:, ~above].any()


def test_a_shorter_input_is_one_padded_on_the_right() -> None:
    mixer, padded = model(kernel=4), ids()
    padded[:, 7:] = 0
    mask = (torch.arange(12) < 7).expand(2, 12).long()
    torch.testing.assert_close(mixer(ids()[:, :7]).logits, mixer(padded, attention_mask=mask).logits[:, :7])


def test_parameter_counts_are_the_published_ones() -> None:
    flat, heads = (MixerTokens(config(4, h)) for h in (0, 4))
    assert sum(p.numel() for p in flat.parameters()) == 4 * 12**2 + 12
    assert sum(p.numel() for p in heads.parameters()) == 4 * (4 * 12**2 + 12) + 2 * (16**2 + 16)


@pytest.mark.parametrize(("kernel", "heads"), [(1, 0), (4, 2)])
def test_a_folder_gives_the_same_model_back(tmp_path: Path, kernel: int, heads: int) -> None:
    mixer = model(kernel, heads)
    save_pretrained(mixer, None, tmp_path / "model", {})
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load_pretrained(tmp_path / "model")):
        assert isinstance(loaded, MixerForCausalLM)
        assert torch.equal(loaded(ids()).logits, mixer(ids()).logits)
    assert type(AutoModel.from_config(mixer.config)).__name__ == "MixerModel"


def test_it_is_a_causal_language_model_to_the_training_loop() -> None:
    assert is_causal(model())
    assert has_plain_head(model())


def test_what_a_mixer_cannot_do_is_refused() -> None:
    mixer = model()
    with pytest.raises(ValueError, match="got 13 tokens, but the mixing matrices have 12"):
        mixer(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="padding on the left"):
        mixer(ids(), attention_mask=(torch.arange(12) > 2).expand(2, 12).long())
    with pytest.raises(ValueError, match="no key-value cache"):
        mixer(ids(), use_cache=True)
    with pytest.raises(ConfigError, match="5 heads do not divide the width 16"):
        config(heads=5)
