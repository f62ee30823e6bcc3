"""From a model to its quantized folder and back, by the method itself, for each kind of architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.core.console import Console
from luthier.models.load import load_pretrained
from luthier.models.stream import LayerStream
from luthier.quantize.calibration import Windows
from luthier.quantize.checkpoint import read_quantized, write_checkpoint
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.methods import METHODS
from luthier.quantize.walk import quantize_layers


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe", "instella", "olmo2"])
def test_quantize_save_load_generate(kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_folder(kind)
    config = QuantizeConfig(model=str(source), group_size=32, rounds=2, epochs=(1, 1), batch_size=2, precision="fp32")
    ids = torch.randint(0, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    quantized = quantize_layers(
        LayerStream.open(source),
        Windows(ids[:4], ids[4:]),
        METHODS[config.method],
        config,
        tmp_path / "layers",
        console=Console(),
    )
    kept = {"config_extra": {}, "dtype": torch.float32, "provenance": {}}
    write_checkpoint(source, tmp_path / "codes", quantized, **kept)
    write_checkpoint(source, tmp_path / "pseudo", quantized, pseudo=True, **kept)
    for name, weight in read_quantized(tmp_path / "codes").items():
        assert torch.equal(weight.codes, quantized[name].codes)
        assert torch.equal(weight.theta, quantized[name].theta)

    models = [load_pretrained(folder) for folder in (source, tmp_path / "codes", tmp_path / "pseudo")]
    with torch.no_grad():
        original, codes, pseudo = (model(ids).logits for model in models)
    torch.testing.assert_close(codes, pseudo, rtol=1e-3, atol=1e-4)
    assert 0 < float((codes - original).norm() / original.norm()) < 0.5
    written = models[1].generate(ids[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 17)
