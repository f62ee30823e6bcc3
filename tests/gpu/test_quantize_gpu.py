"""The kernels of quantized weights on a CUDA device, by the checks that also run in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCRIPT = Path(__file__).parents[1] / "quantize" / "gpu_checks.py"


def test_every_check_passes() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, SCRIPT, "cuda"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    failed = {name: error for name, error in json.loads(done.stdout).items() if error is not None}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
