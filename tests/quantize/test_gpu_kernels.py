"""The GPU kernels in Triton's interpreter, in a process of their own, which knows of it from the start."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.quantize.kernels import gpu

SCRIPT = Path(__file__).with_name("gpu_checks.py")
CHECKS = [
    line.split("(")[0].removeprefix("def check_")
    for line in SCRIPT.read_text().splitlines()
    if line.startswith("def check_")
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    """What every check said; all in one process, because loading torch and Triton takes longer than they do."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT, "cpu"], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]


@needs_triton
def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """Triton's compiler needs no GPU; it refuses what the interpreter lets pass."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = SCRIPT.with_name("gpu_compile.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    names = ["rotate", "blocks", "one", "few", "decode", "fused"]
    assert done.stdout.split() == [f"_{name}_kernel" for name in names]


def test_available_needs_triton_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not gpu.available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not gpu.available()
