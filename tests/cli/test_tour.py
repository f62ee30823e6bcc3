from __future__ import annotations

import io
from pathlib import Path

import pytest

from luthier.cli import tour
from luthier.cli.run import read_recipe
from luthier.cli.tour import TourConfig, recipe_folder
from luthier.core.console import Console
from luthier.core.run import RunFolder


@pytest.mark.parametrize("size", ["nano", "tiny", "small"])
def test_every_size_of_the_tour_is_a_valid_recipe(size: str, tmp_path: Path) -> None:
    stages = read_recipe(recipe_folder() / "tour.yaml", tmp_path, [f"pretrain.size={size}"])
    assert stages[0].config.size == size
    assert stages[0].config.data == ("python-prose",)
    assert "pretrain" in stages[1].needs


def test_the_tour_runs_its_recipe_and_shows_the_last_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def finished(recipe: Path, out: Path, changes: tuple[str, ...], console: Console) -> None:
        asked.append((recipe.name, changes))
        run = RunFolder.open(out / "01-pretrain", {})
        for step, text in ((1, " early"), (2, " late")):
            run.write_sample(step, [{"prompt": "The", "text": text}])
        run.close()

    monkeypatch.setattr(tour, "run_recipe", finished)
    out = io.StringIO()
    tour.run(TourConfig(size="tiny", out=tmp_path), Console(out=out))
    assert asked == [("tour.yaml", ("pretrain.size=tiny",))]
    assert "The| late" in out.getvalue()
    assert "early" not in out.getvalue()
    assert f"luthier chat {tmp_path / '01-pretrain' / 'model'}" in out.getvalue()
