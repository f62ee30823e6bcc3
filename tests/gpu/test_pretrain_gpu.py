"""Pretraining on a CUDA device; skipped where there is none."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.cli.main import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # inductor's own
]


def losses(text_file, out, *flags, code=0):
    options = (
        "--size nano --vocab-size 280 --sequence-length 64 --batch-size 8 --steps 5 --warmup-steps 1 --log-every 1"
    )
    arguments = ["pretrain", *options.split(), "--data", str(text_file), "--out", str(out), "--eval-every", "0", *flags]
    assert main(arguments) == code
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_fp32_on_cuda_equals_the_cpu(text_file, tmp_path):
    cpu = losses(text_file, tmp_path / "cpu", "--device", "cpu", "--precision", "fp32", "--compile", "off")
    cuda = losses(text_file, tmp_path / "cuda", "--device", "cuda", "--precision", "fp32", "--compile", "off")
    assert cuda == pytest.approx(cpu, abs=2e-3)


def test_compiled_bf16_follows_fp32(text_file, tmp_path):
    exact = losses(text_file, tmp_path / "fp32", "--device", "cuda", "--precision", "fp32", "--compile", "off")
    fast = losses(text_file, tmp_path / "bf16", "--device", "cuda", "--precision", "bf16", "--compile", "on")
    assert fast == pytest.approx(exact, abs=0.05)


def test_resume_on_cuda(text_file, tmp_path):
    straight = losses(text_file, tmp_path / "straight", "--device", "cuda")
    losses(text_file, tmp_path / "stopped", "--device", "cuda", "--stop-after", "2", code=130)
    assert losses(text_file, tmp_path / "stopped", "--device", "cuda") == pytest.approx(straight, abs=1e-3)
