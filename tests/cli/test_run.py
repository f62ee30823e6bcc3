from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import load_config
from luthier.cli.run import STAGE_VERBS, StageConsole, _inputs, read_recipe, run_recipe
from luthier.core.console import Console
from luthier.core.errors import ConfigError

Command = Callable[..., Any]
RECIPES = Path(__file__).parents[2] / "recipes"
STAGE_ONE = RECIPES / "instella-3b" / "pretrain-stage1.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path, tmp_path: Path) -> None:
    assert read_recipe(recipe, tmp_path)
    assert recipe.read_text().startswith("#")


def test_stages_get_numbers_names_and_folders(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "- pretrain:\n    size: nano\n- eval small: {model: '@pretrain/model'}\n- eval: {model: m}\n"
    )
    stages = read_recipe(recipe, tmp_path / "out")
    assert [(stage.name, stage.verb, stage.folder.name) for stage in stages] == [
        ("pretrain", "pretrain", "01-pretrain"),
        ("small", "eval", "02-small"),
        ("eval", "eval", "03-eval"),
    ]
    assert stages[0].config.out == tmp_path / "out" / "01-pretrain"
    assert stages[1].config.model == str(tmp_path / "out" / "01-pretrain" / "model")
    assert [stage.needs for stage in stages] == [(), ("pretrain",), ()]


def test_references_work_in_lists_and_are_counted_once(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "- pretrain: {}\n- pretrain more: {data: ['@pretrain/data', x], tokenizer: '@pretrain/m'}\n"
    )
    stage = read_recipe(recipe, tmp_path)[1]
    assert stage.config.data == (str(tmp_path / "01-pretrain" / "data"), "x")
    assert stage.needs == ("pretrain",)


def test_set_changes_a_setting(tmp_path: Path) -> None:
    recipe = write(tmp_path, "- pretrain: {size: nano}\n- pretrain two:\n")
    one, two = read_recipe(recipe, tmp_path, ["pretrain.steps=70", "two.betas=[0.5, 0.6]", "two.learning_rate=1e-3"])
    assert (one.config.steps, two.config.betas, two.config.learning_rate) == (70, (0.5, 0.6), 1e-3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pretrain: {}", "expected a list of stages"),
        ("- pretrain: {}\n  eval: {}", "expected a list of stages"),
        ("- pretrian: {}", r"stage 'pretrian': no such verb \(did you mean 'pretrain'\?\)"),
        ("- chat: {model: m}", "stage 'chat': this verb makes no stage"),
        ("- pretrain: {}\n- pretrain: {}", "a stage of that name exists already"),
        ("- pretrain a/b: {}", "the name 'a/b' is not made of"),
        ("- pretrain: 3", "got int 3, expected a mapping"),
        ("- pretrain: {out: x}", "`out` is set by the recipe"),
        ("- pretrain: {say: [x]}", "`say` is text"),
        ("- pretrain python: {}", "no stage is called that"),
        ("- pretrain: {stesp: 3}", r"pretrain\.stesp: no such setting \(did you mean 'steps'\?\)"),
        ("- pretrain: {steps: x}", r"pretrain\.steps: got str 'x', expected int"),
        ("- pretrain: {size: x}", r"pretrain\.size: got 'x', expected one of pico"),
        ("- pretrain: {steps: 3, steps: 4}", "'steps' is there twice"),
        ("- eval: {}", r"eval\.model: required"),
        ("- eval: {model: '@pretrain/model'}\n- pretrain: {}", "points to 'pretrain', which is no earlier stage"),
        ("- pretrain: {}\n- eval: {model: '@pretrian/model'}", "did you mean 'pretrain'"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(write(tmp_path, text), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("steps=3", "'steps=3' is no stage"),
        ("pretrian.steps=3", "did you mean 'pretrain'"),
        ("pretrain.steps", "expected key=value"),
        ("pretrain.stesp=3", "did you mean 'steps'"),
        ("pretrain.steps=[", "not valid YAML"),
    ],
)
def test_a_bad_set_is_refused(tmp_path: Path, change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recipe(write(tmp_path, "- pretrain: {size: nano}"), tmp_path / "out", [change])


def test_the_papers_recipe_says_its_size_without_torch() -> None:
    code = (
        "import sys; from luthier.cli.main import main\n"
        f"code = main(['run', {str(STAGE_ONE)!r}, '--dry-run'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules); raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3,112,675,840" in done.stdout
    assert "4,064,997,801,984" in done.stdout


def test_a_dry_run_writes_nothing_and_gives_one_object(luthier: Command, tmp_path: Path) -> None:
    outcome = luthier("run", RECIPES / "tour.yaml", "--out", tmp_path / "out", "--dry-run", "--json")
    stages = read_recipe(RECIPES / "tour.yaml", tmp_path)
    assert list(json.loads(outcome.out)["stages"]) == [stage.name for stage in stages]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, luthier: Command, text_file: Path) -> tuple[Path, Path]:
    """A recipe and the folder of its finished run: two evaluations of one stage's model."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = (
        "size: nano, steps: 2, sequence_length: 32, batch_size: 4, vocab_size: 300, warmup_steps: 1, eval_every: 0, "
        f"sample_prompts: [], precision: fp32, device: cpu, data: ['{text_file}']"
    )
    evaluation = "model: '@pretrain/model', data: '@pretrain/data/held-out', compressors: false, device: cpu"
    recipe = write(folder, f"- pretrain: {{{settings}}}\n- eval: {{{evaluation}}}\n")
    outcome = luthier("run", recipe, "--out", folder / "out", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert set(result["stages"]) == {"pretrain", "eval"}
    assert result["stages"]["eval"]["score"]["bits_per_byte"] > 0
    assert Path(result["report"]).is_file()
    return recipe, folder / "out"


def test_a_finished_run_has_the_results_of_its_stages(done: tuple[Path, Path]) -> None:
    summary = json.loads((done[1] / "summary.json").read_text())
    assert summary["verb"] == "run"
    assert set(summary["headline"]) == {"pretrain: held-out bits per byte", "eval: bits per byte"}
    assert [table["columns"][1] for table in summary["tables"]] == ["bits/byte"]


def test_unchanged_stages_are_skipped(luthier: Command, done: tuple[Path, Path]) -> None:
    recipe, out = done
    before = (out / "01-pretrain" / "metrics.jsonl").stat().st_mtime_ns
    outcome = luthier("run", recipe, "--out", out)
    assert outcome.code == 0
    assert outcome.err.count("done before, skipped") == 2
    assert (out / "01-pretrain" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_stage_that_was_not_finished_runs_again_alone(luthier: Command, done: tuple[Path, Path]) -> None:
    recipe, out = done
    (out / "02-eval" / "stage.json").unlink()
    (out / "02-eval" / "summary.json").unlink()
    outcome = luthier("run", recipe, "--out", out)
    assert "== 01-pretrain: done before, skipped\n\n== 02-eval\n" in outcome.err
    assert (out / "02-eval" / "summary.json").is_file()


def test_a_changed_setting_is_refused_with_the_difference(luthier: Command, done: tuple[Path, Path]) -> None:
    recipe, out = done
    leaf = luthier("run", recipe, "--out", out, "--set", "eval.batch_size=2")
    assert (leaf.code, leaf.error.partition(" holds")[0]) == (2, f"{out}/02-eval")
    assert "another config: batch_size: 8 -> 2" in leaf.error
    root = luthier("run", recipe, "--out", out, "--set", "pretrain.steps=3")
    assert root.code == 2
    assert "02-eval read files, or stages, that have changed; 01-pretrain.steps: 2 -> 3" in root.error
    again = luthier("run", recipe, "--out", out)  # what was refused left no trace
    assert again.err.count("done before, skipped") == 2


def packed(folder: Path, names: Sequence[str], **settings: str) -> str:
    """A recipe that packs a text with each of these names, the next one from the last one's file."""
    stages, source = [], folder / "a.txt"
    for name in names:
        chosen = settings.get(name, "model: none")
        stages.append(f"- compress {name}: {{files: ['{source}'], out: '@/{name}.bin', {chosen}}}\n")
        source = f"@{name}/{name}.bin"
    return "".join(stages)


def test_a_stage_without_work_may_change_and_others_may_follow(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It rings. " * 50)
    out = tmp_path / "out"
    broken = write(tmp_path, packed(tmp_path, ["one", "two"], two="model: absent"))
    assert luthier("run", broken, "--out", out).code == 2
    mended = luthier("run", write(tmp_path, packed(tmp_path, ["one", "two", "three"])), "--out", out)
    assert mended.code == 0, mended.err
    assert "== 01-one: done before, skipped\n\n== 02-two\n\n== 03-three\n" in mended.err


def test_other_inputs_are_refused_until_what_they_made_is_moved_away(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It rings. " * 50)
    out, recipe = tmp_path / "out", write(tmp_path, packed(tmp_path, ["one", "two"]))
    assert luthier("run", recipe, "--out", out).code == 0
    (tmp_path / "a.txt").write_text("It sings. " * 50)
    refused = luthier("run", recipe, "--out", out)
    assert refused.code == 2
    changed = "read files, or stages, that have changed"
    assert refused.error == f"{out}: 01-one {changed}; 02-two {changed}"
    assert refused.err.endswith(f"or move away {out}/01-one, {out}/02-two\n")
    (out / "01-one").rename(tmp_path / "kept")
    assert luthier("run", recipe, "--out", out).error == f"{out}: 02-two {changed}"
    (out / "02-two").rename(tmp_path / "kept too")
    assert "== 01-one\n\n== 02-two\n" in luthier("run", recipe, "--out", out).err


def test_files_that_stages_write_outside_the_run_are_no_changed_inputs(luthier: Command, tmp_path: Path) -> None:
    text, packed, again = (tmp_path / name for name in ("a.txt", "a.bin", "again.txt"))
    text.write_text("It rings. " * 50)
    stages = f"- compress: {{files: ['{text}'], out: '{packed}', model: none}}\n"
    recipe = write(tmp_path, stages + f"- decompress: {{files: ['{packed}'], out: '{again}'}}\n")
    assert luthier("run", recipe, "--out", tmp_path / "out").code == 0
    done = luthier("run", recipe, "--out", tmp_path / "out")
    assert done.err.count("done before, skipped") == 2
    packed.write_bytes(b"others")
    assert "02-decompress read files" in luthier("run", recipe, "--out", tmp_path / "out").error


def test_work_of_no_stage_is_not_left_behind(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It rings. " * 50)
    out = tmp_path / "out"
    assert luthier("run", write(tmp_path, packed(tmp_path, ["one", "two"])), "--out", out).code == 0
    refused = luthier("run", write(tmp_path, packed(tmp_path, ["two"])), "--out", out)
    assert refused.error == f"{out}: 01-one is no stage of this recipe; 02-two is no stage of this recipe"


@pytest.mark.slow
def test_two_ranks_run_all_stages_and_one_of_them_writes(
    done: tuple[Path, Path], tmp_path: Path, launch: Callable[..., Any]
) -> None:
    ranks = launch(2, "-m", "luthier", "run", done[0], "--out", tmp_path / "two")
    assert ranks.code == 0, ranks.err
    one, two = (
        json.loads((out / "02-eval" / "summary.json").read_text())["score"] for out in (done[1], tmp_path / "two")
    )
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-3)
    assert ranks.out.count("report:") == 2  # the stage's and the recipe's, from the first rank alone


def test_a_folder_that_a_stage_reads_is_part_of_its_identity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    values = {"data": [str(tmp_path)], "tokenizer": ""}
    before = _inputs(values)
    assert list(before) == [str(tmp_path)]
    assert _inputs(values) == before
    (tmp_path / "b.txt").write_text("two")
    assert _inputs(values) != before


def test_a_shipped_recipe_is_found_from_any_folder(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = luthier("run", "recipes/instella-3b/pretrain-stage1.yaml", "--dry-run")
    assert outcome.code == 0
    assert "3,112,675,840" in outcome.out


def test_a_task_in_front_of_a_reference_stays_there(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- problems: {}\n- eval: {model: org/name, tasks: ['needle:@problems/test-4.jsonl']}\n")
    (_, stage) = read_recipe(recipe, tmp_path / "out")
    assert stage.config.tasks == (f"needle:{tmp_path}/out/01-problems/test-4.jsonl",)
    assert stage.needs == ("problems",)


def test_a_verb_without_a_run_folder_gets_one(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It rings. " * 500)
    packed = "- compress: {files: ['TEXT'], out: '@/text.lut', model: none, force: true, say: 'A file, smaller.'}\n"
    unpacked = "- decompress: {files: ['@compress/text.lut'], out: '@/text.txt', force: true}\n"
    recipe = write(tmp_path, packed.replace("TEXT", str(tmp_path / "text.txt")) + unpacked)
    outcome = luthier("run", recipe, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "== 01-compress\nA file, smaller.\n\n== 02-decompress\n" in outcome.err
    first, second = tmp_path / "out" / "01-compress", tmp_path / "out" / "02-decompress"
    assert (second / "text.txt").read_text() == "It rings. " * 500
    done = json.loads((first / "stage.json").read_text())
    assert done["result"]["files"][0]["bytes"] == 5000
    assert done["processor_seconds"] >= 0
    (table,) = json.loads((first / "summary.json").read_text())["tables"]
    assert (table["title"], table["columns"][:2]) == ("files", ["file", "bytes"])
    assert "text.txt" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["headline"] == {}
    again = luthier("run", write(tmp_path, recipe.read_text().replace("smaller", "very small")), "--out", first.parent)
    assert again.err.count("done before, skipped") == 2


def test_a_short_result_is_a_headline_and_a_printed_table_is_kept(tmp_path: Path) -> None:
    console = StageConsole(Console(out=io.StringIO()))
    console.table("Figures", ["a"], [["1"]])
    console.result({"final_answer": "7", "text": "x" * 100, "steps": [], "files": [{"name": "n", "bytes": None}]})
    assert console.summary() == {
        "headline": {"final answer": "7"},
        "tables": [
            {"title": "Figures", "columns": ["a"], "rows": [["1"]], "note": ""},
            {"title": "files", "columns": ["name", "bytes"], "rows": [["n", "—"]]},
        ],
    }


def test_a_stage_that_is_left_out_runs_later(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    stage = f"{{files: ['{tmp_path / 'a.txt'}'], out: '@/a.lut', model: none, force: true}}"
    recipe, err = write(tmp_path, f"- compress one: {stage}\n- compress two: {stage}\n"), io.StringIO()
    console = Console(out=io.StringIO(), err=err)
    run_recipe(recipe, tmp_path / "out", (), console, without={"one"})
    assert "== 01-one: left out\n\n== 02-two\n" in err.getvalue()
    assert not (tmp_path / "out" / "01-one").exists()
    run_recipe(recipe, tmp_path / "out", (), console)
    assert (tmp_path / "out" / "01-one" / "a.lut").is_file()
    assert "== 02-two: done before, skipped" in err.getvalue()


def test_the_texts_of_the_standard_library_can_be_named(tmp_path: Path) -> None:
    recipe = write(tmp_path, "- compress: {files: ['@python/pydoc_data/topics.py'], out: '@/topics.lut'}\n")
    (stage,) = read_recipe(recipe, tmp_path / "out")
    assert Path(stage.config.files[0]).is_file()
    assert stage.config.out == tmp_path / "out" / "01-compress" / "topics.lut"
    assert stage.needs == ()


def test_no_verb_has_the_setting_that_a_recipe_takes_for_itself() -> None:
    for verb in STAGE_VERBS:
        assert "say" not in load_config(verb).__dataclass_fields__  # type: ignore[attr-defined]
