"""The benchmark of the recipe's effects: its controls, its seeds, and how two stages are compared. No training here."""

from __future__ import annotations

from pathlib import Path

import instella_effects as effects
import pytest

from luthier.cli.run import read_recipe
from luthier.core.files import atomic_write

ROOT = Path(__file__).parents[2]


def stages_of(folder: Path, seed: int) -> dict:
    atomic_write(folder / "recipe.yaml", effects.recipe_of(effects.listed(()), seed))
    return {stage.name: stage for stage in read_recipe(folder / "recipe.yaml", folder)}


def test_seed_0_is_the_recipe_and_others_move_every_seed(tmp_path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "instella-tiny.yaml", tmp_path)
    first, second = (stages_of(tmp_path, seed) for seed in (0, 1))
    for stage in recipe:
        assert first[stage.name].config == stage.config
    for name, stage in first.items():
        moved = second[name].config
        if stage.verb == "eval":
            assert moved == stage.config
        elif hasattr(moved, "seed"):
            assert moved.seed == stage.config.seed + 1000


def test_a_control_differs_from_its_stage_in_what_its_name_says() -> None:
    stages = effects.listed(["stage2-a.steps=7", "mathrl.steps=4"])
    assert stages["stage2-long"] == ("pretrain", stages["stage2-a"][1] | {"steps": 21})
    assert stages["sft-more"][1] == stages["sft"][1] | {"model": "@dpo/model", "steps": 52}
    assert stages["dpo-sum"][1] == stages["dpo"][1] | {"loss": "sum", "beta": 0.5}
    assert stages["extend-keep"][1] == stages["extend"][1] | {"theta": "keep"}
    assert stages["needles-keep"][1] == stages["needles-long"][1] | {"model": "@extend-keep/model"}


def test_every_line_names_stages_that_there_are() -> None:
    stages = effects.listed(())
    lines = effects.effects(stages)
    assert list(lines) == ["stage2", "soup", "format", "dpo", "grpo", "theta"]
    assert {stage for some in lines.values() for line in some for stage in line.stages} <= set(stages)


def test_only_what_an_effect_needs_is_run(tmp_path) -> None:
    stages_of(tmp_path, 0)
    assert effects.needed(tmp_path / "recipe.yaml", tmp_path, {"needles-keep"}) == {
        *("needles-keep", "extend-keep", "longer", "long-data", "short", "needles-short"),
    }


def test_other_settings_are_refused_in_the_same_folder(tmp_path) -> None:
    effects.check_recipe(effects.listed(()), 0, tmp_path)
    (tmp_path / "seed-0.yaml").write_text(effects.recipe_of(effects.listed(()), 0))
    effects.check_recipe(effects.listed(()), 0, tmp_path)
    with pytest.raises(SystemExit, match="is another recipe"):
        effects.check_recipe(effects.listed(["sft.steps=2"]), 0, tmp_path)


SCORES = {
    "one": {"a": (3.0, 3.0), "b": (1.0, 1.0), "c": (0.0, 1.0)},
    "two": {"a": (3.0, 3.0), "b": (0.0, 1.0)},
    "three": {"a": (0.0, 3.0), "b": (1.0, 1.0)},
}


def test_stages_are_compared_on_the_items_of_all_by_their_weights(tmp_path) -> None:
    def line(**more):
        return effects.Line("x", lambda run, stage: SCORES[stage], ("one",), ("two", "three"), "y", **more)

    found = effects.measure(line(), tmp_path)
    assert (found.ours, found.theirs) == (pytest.approx(1.0), pytest.approx(0.5))
    assert found.difference == pytest.approx(0.5)
    assert effects.measure(line(best=True), tmp_path).theirs == pytest.approx(0.75)
    assert effects.measure(line(best=True, lower=True), tmp_path).theirs == pytest.approx(0.25)
