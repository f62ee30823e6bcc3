from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("gad_ranks.py")


def run(folder: Path, out: Path, ranks: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, str(SCRIPT), str(folder), str(out), str(ranks)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_ranks_train_both_networks_as_one_does(student_folder, tmp_path):
    for ranks in (1, 2):
        run(student_folder, tmp_path / str(ranks), ranks)
    start = load_file(student_folder / "model.safetensors")
    for variant, name in itertools.product(("replies", "tokens"), ("student", "discriminator")):
        one, two = (load_file(tmp_path / str(ranks) / variant / f"{name}.safetensors") for ranks in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(
                two[key], one[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
        moved = "lm_head.weight" if name == "student" else "backbone.embed_tokens.weight"
        assert not torch.equal(one[moved], start[moved.replace("backbone", "model")])
