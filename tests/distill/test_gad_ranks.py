from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("gad_ranks.py")


@pytest.mark.slow
def test_two_ranks_train_both_networks_as_one_does(student_folder, tmp_path, launch):
    for ranks in (1, 2):
        done = launch(ranks, SCRIPT, student_folder, tmp_path / str(ranks), ranks)
        assert done.code == 0, done.out + done.err
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
