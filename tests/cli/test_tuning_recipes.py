"""The recipes of Instella-3B after pretraining: every setting is checked, and the paper's numbers are in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.cli.run import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "instella-3b"


@pytest.mark.parametrize("name", ["sft", "dpo", "math-sft", "math-rl"])
def test_a_recipe_passes_a_dry_run_with_nothing_on_this_machine(luthier, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    outcome = luthier("run", f"recipes/instella-3b/{name}.yaml", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "settings are valid" in outcome.out
    assert not list(tmp_path.iterdir())


def test_their_numbers_are_the_papers(tmp_path):
    found = {
        stage.name: stage.config
        for name in ("sft", "dpo", "math-rl")
        for stage in read_recipe(RECIPES / f"{name}.yaml", tmp_path)
    }
    sft, dpo = found["sft"], found["dpo"]
    assert (sft.learning_rate, sft.warmup_steps(50_937), sft.batch_size * sft.max_length) == (1e-5, 500, 524_288)
    assert (dpo.strength, dpo.learning_rate, dpo.warmup_steps(2865), dpo.grad_clip) == (5.0, 5e-7, 286, 0.0)
    stages = [found[f"stage{number}"] for number in (1, 2, 3)]
    assert [stage.generations for stage in stages] == [8, 16, 16]
    rollouts = [stage.steps * stage.batch_size // stage.rollout_prompts for stage in stages]
    assert rollouts == [1200, 600, 740]
    assert {(stage.clip, stage.kl, stage.learning_rate, stage.weight_decay) for stage in stages} == {
        ((0.2, 0.2, 3.0), 0.001, 1e-6, 0.01)
    }
