from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import tour
from luthier.cli.run import Stage, read_recipe, recipe_folder
from luthier.cli.tour import TourConfig, left_out
from luthier.cli.tour_view import SYSTEMS, Done, lines
from luthier.core.console import Console
from luthier.core.files import write_json
from luthier.core.run import RunFolder

RECIPE = recipe_folder() / "tour.yaml"


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    return read_recipe(RECIPE, tmp_path)


@pytest.mark.parametrize("size", ["nano", "tiny", "small"])
def test_every_size_of_the_tour_is_a_valid_recipe(size: str, tmp_path: Path) -> None:
    stages = read_recipe(RECIPE, tmp_path, [f"pretrain.size={size}"])
    assert stages[0].config.size == size
    assert stages[0].config.data == ("python-prose",)
    assert "pretrain" in stages[1].needs


def test_every_stage_says_in_few_words_what_happens(stages: list[Stage]) -> None:
    assert all(20 <= len(stage.say) <= 240 for stage in stages), [s.name for s in stages if not 20 <= len(s.say) <= 240]


def test_the_end_needs_stages_that_there_are(stages: list[Stage]) -> None:
    names = {stage.name for stage in stages}
    for system in SYSTEMS:
        assert names >= {*system.needs, *(name for name, _ in system.pages)}
        assert system.next.format_map({name: Path(name) for name in names}).startswith("luthier ")


# What is left out


def test_nothing_is_left_out_where_everything_is_installed(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert left_out(stages) == []


def test_without_trl_tuning_is_left_out_and_what_serves_it_alone(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    assert set(left_out(stages)) == {
        *("word-problems", "sft", "after-sft", "mathrl", "after-rl"),
        *("prompts", "teacher", "student", "seqkd", "distill", "gauge"),
    }


def test_the_tour_says_what_it_leaves_out_and_tells_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def finished(recipe: Path, out: Path, changes: tuple[str, ...], console: Console, *, without: list[str]) -> None:
        asked.update(recipe=recipe.name, changes=changes, without=without)
        for stage in read_recipe(recipe, out, changes)[:2]:
            run = RunFolder.open(stage.folder, {})
            run.write_sample(1, [{"prompt": "The", "text": " early"}])
            run.write_sample(2, [{"prompt": "The", "text": " late"}])
            run.close()
            write_json(stage.done, {"result": SCORE, "seconds": 90, "processor_seconds": 150})

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    monkeypatch.setattr(tour, "run_recipe", finished)
    out, err = io.StringIO(), io.StringIO()
    tour.run(TourConfig(size="tiny", out=tmp_path, set=("eval.batch_size=2",)), Console(out=out, err=err))
    assert asked["recipe"] == "tour.yaml"
    assert asked["changes"] == ("pretrain.size=tiny", "eval.batch_size=2")
    assert "sft" in asked["without"]
    assert "left out: word-problems, sft" in err.getvalue()
    assert "pip install 'luthier[train]'" in out.getvalue()
    assert "needs 1.800 bits per byte; xz, given the same training text, needs 1.900." in " ".join(
        out.getvalue().split()
    )
    assert "2 stages took 3.0 minutes, in which processors worked 5.0." in out.getvalue()
    assert " late" in out.getvalue()
    assert "early" not in out.getvalue()
    assert f"luthier chat {tmp_path / '01-pretrain' / 'model'}" in out.getvalue()


# What is told of numbers

SCORE = {
    "bits_per_byte": 1.8,
    "table": [["model", "—", "", "1.800"], ["gzip", "2", "—", "2.5"], ["xz", "2", "—", "1.9"]],
}


def told(name: str, **stages: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """The sentences about a system, given results and summaries of its stages."""
    (system,) = (system for system in SYSTEMS if system.name == name)
    done = {key.replace("_", "-"): Done(Path(key), *found) for key, found in stages.items()}
    return " ".join(system.tell(done))


def test_a_model_that_a_compressor_beats_is_said_to_be_beaten() -> None:
    assert "1.800 bits per byte; xz, given the same training text, needs 1.900." in told("train", eval=(SCORE, {}))
    assert "needs 1.900, which is less." in told("train", eval=({**SCORE, "bits_per_byte": 1.95}, {}))


def solved(share: float) -> dict[str, Any]:
    return {"tasks": {"test": {"cot": {"accuracy": {"value": share, "n": 200}}}}}


def against(p: str) -> dict[str, Any]:
    return {
        "tables": [{"columns": ["method"], "rows": []}, {"columns": ["n", "p (exact McNemar)"], "rows": [["9", p]]}]
    }


@pytest.mark.parametrize(
    ("before", "after", "p", "verdict"),
    [(0.5, 0.6, "0.004", "better (p = 0.004)"), (0.5, 0.4, "0.04", "worse (p = 0.04)"), (0.5, 0.6, "0.2", "no clear")],
)
def test_a_difference_counts_where_chance_does_not_explain_it(
    before: float, after: float, p: str, verdict: str
) -> None:
    text = told("train further", after_sft=(solved(before), {}), after_rl=(solved(after), against(p)))
    assert f"Of 200 unseen sums it solves {before:.2f} after fine-tuning and {after:.2f}" in text
    assert verdict in text


def reasoning(cot: float, ssr: float, vote: float, p: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    shares = {"cot:x": (cot, 20), "ssr:x": (ssr, 80), "maj@4:x": (vote, 80)}
    methods = {
        name: {"accuracy": {"value": share, "n": 100}, "completion_tokens": tokens}
        for name, (share, tokens) in shares.items()
    }
    pairs = [
        ["cot:x", "ssr:x", "1", "2", p[0]],
        ["cot:x", "maj@4:x", "1", "2", "1"],
        ["ssr:x", "maj@4:x", "1", "2", p[1]],
    ]
    table = {"columns": ["first", "second", "a", "b", "p (exact McNemar)"], "rows": pairs}
    return {"tasks": {"test-6": methods}}, {"tables": [table]}


def test_checking_is_held_against_one_chain_and_a_vote() -> None:
    text = told("reason", reasoning=reasoning(0.5, 0.7, 0.6, ("0.001", "0.2")))
    assert "one chain of thought solves 0.50, checking every line 0.70 at 4.0 times the tokens: better" in text
    assert (
        "A vote (maj@4) at 4.0 times the tokens solves 0.60; checking beside it: no clear difference (p = 0.2)" in text
    )
    assert "0.40 at 4.0 times the tokens: worse" in told("reason", reasoning=reasoning(0.5, 0.4, 0.6, ("0.01", "0.01")))


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ("-0.095 [-0.135, -0.055]", "is worse"),
        ("0.095 [0.055, 0.135]", "is better"),
        ("0.01 [-0.02, 0.03]", "is no clear one"),
        ("unknown", "is not known"),
    ],
)
def test_an_interval_around_zero_is_no_difference(difference: str, verdict: str) -> None:
    students = {"seqkd": {"matched": 0.86}, "gad": {"matched": None}}
    tables = {"tables": [{"title": "Minus seqkd", "rows": [["gad", difference]]}]}
    gates = [{"tables": [{"title": title}]} for title in ("Gate: open", "Gate: shut, and forced")]
    opened, shut = (told("distill", gauge=({"students": students}, tables), distill=({}, gate)) for gate in gates)
    assert f"{verdict}." in opened
    assert "an unknown share of the adversarial student's replies, 0.86 of the imitator's" in opened
    assert "gate" not in opened
    assert "The gate was shut" in shut


def test_rotations_that_gain_nothing_are_said_to_gain_nothing() -> None:
    sizes = {"A": 5_000_000, "B": 1_200_000}
    ours, rounded = (({"kl": {"value": kl}, "bytes": sizes}, {}) for kl in (0.007, 0.016))
    assert "by 0.0070 nats per token; by plain rounding, 0.0160. On disk 5.0 MB become 1.2" in told(
        "quantize", compare=ours, rounded_compare=rounded
    )
    assert "they gain nothing" in told("quantize", compare=rounded, rounded_compare=ours)


def test_the_compressor_stands_beside_others_on_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It rings. " * 1000)
    files = [{"file": str(tmp_path / "text"), "bytes": 10_000, "compressed_bytes": 77}]
    text = told("entropy", estimate=({"bits_per_byte": 1.8}, {}), compress=({"files": files}, {}))
    assert "at most 1.800 bits per byte. The compressor makes 77 bytes of 10,000; xz makes " in text


def test_stages_that_are_missing_are_named(tmp_path: Path) -> None:
    assert "Left out here: sft, after-sft, mathrl, after-rl." in "\n".join(lines({}, tmp_path))
