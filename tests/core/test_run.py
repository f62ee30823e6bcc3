from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.core.files import OLD, TEMPORARY
from luthier.core.run import RunFolder

CONFIG = {"steps": 3, "optimizer": {"rate": 0.1}, "out": "here"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with one row of metrics, closed."""
    run = RunFolder.open(tmp_path / "run", CONFIG)
    run.log("train", step=1)
    run.close()
    return run.path


def test_a_new_run_has_config_and_env(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a" / "run", CONFIG)
    assert run.config == CONFIG
    assert run.env["python"]
    assert run.summary == {}
    assert run.metrics() == run.samples() == run.checkpoint_steps() == []
    run.close()


def test_the_same_config_resumes(folder: Path) -> None:
    run = RunFolder.open(folder, CONFIG)
    assert run.metrics() == [{"kind": "train", "step": 1}]
    run.close()


def test_another_config_is_refused_with_the_difference(folder: Path) -> None:
    other = {**CONFIG, "steps": 4, "optimizer": {"rate": 0.2}}
    with pytest.raises(ConfigError, match=r"steps: 3 -> 4; optimizer\.rate: 0\.1 -> 0\.2"):
        RunFolder.open(folder, other)
    assert RunFolder.read(folder).config == CONFIG
    RunFolder.open(folder, CONFIG).close()  # the refusal let go of the lock


def test_some_keys_may_change(folder: Path) -> None:
    run = RunFolder.open(folder, {**CONFIG, "out": "there"}, may_change=["out"])
    assert run.config["out"] == "there"
    run.close()


def test_a_run_without_any_work_takes_another_config(tmp_path: Path) -> None:
    """A typo that is found before anything was done can be mended with the same --out."""
    RunFolder.open(tmp_path / "run", {"data": "typo"}).close()
    RunFolder.open(tmp_path / "run" / "01-stage", {"data": "typo"}).close()
    run = RunFolder.open(tmp_path / "run", {"data": "right"})
    assert run.config == {"data": "right"}
    run.close()


def test_a_folder_with_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunFolder.open(tmp_path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_crash_while_opening_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / f".config.yaml.77{TEMPORARY}").write_text("ste")
    RunFolder.open(tmp_path, CONFIG).close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "config.yaml", "env.json"]


def test_a_second_process_is_kept_out_until_the_first_leaves(folder: Path) -> None:
    code = (
        f"from luthier.core.run import RunFolder; from pathlib import Path; RunFolder.open(Path('{folder}'), {CONFIG})"
    )
    run = RunFolder.open(folder, CONFIG)
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing to this run" in second.stderr
    run.close()
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert third.returncode == 0, third.stderr


def test_leftovers_of_a_crash_go_but_a_replaced_folder_comes_back(folder: Path) -> None:
    for name in ("data", "samples", "checkpoints"):
        (folder / name).mkdir()
    (folder / f".model{OLD}").mkdir()
    (folder / f".model{OLD}" / "weights").write_text("the only ones")
    (folder / "data" / f".train-0.77{TEMPORARY}").mkdir()
    (folder / "samples" / f".step-00000001.json.77{TEMPORARY}").write_text("{")
    (folder / "checkpoints" / f"step-00000002{TEMPORARY}").mkdir()
    RunFolder.open(folder, CONFIG).close()
    assert (folder / "model" / "weights").read_text() == "the only ones"
    assert not list(folder.rglob(f"*{TEMPORARY}"))


def test_rewind_forgets_what_came_after(folder: Path) -> None:
    run = RunFolder.open(folder, CONFIG)
    run.log("note", text="no step")
    for step in (2, 3):
        run.log("train", step=step)
        run.write_sample(step, [{"prompt": "The", "text": " end"}])
    run.rewind(2)
    assert [row.get("step") for row in run.metrics()] == [1, None, 2]
    assert [sample["step"] for sample in run.samples()] == [2]
    assert run.metrics("note") == [{"kind": "note", "text": "no step"}]
    run.close()


def test_checkpoints_are_listed_and_pruned(folder: Path) -> None:
    run = RunFolder.open(folder, CONFIG)
    for step in (4, 12, 8):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (run.checkpoints / f"step-00000016{TEMPORARY}").mkdir()
    assert run.checkpoint_steps() == [4, 8, 12]
    run.prune_checkpoints(2)
    assert run.checkpoint_steps() == [8, 12]
    run.prune_checkpoints(0)
    assert run.checkpoint_steps() == []
    run.close()


def test_reading_needs_a_run(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.read(tmp_path)
    (folder / "config.yaml").write_text("")
    with pytest.raises(DataError, match="expected a mapping"):
        _ = RunFolder.read(folder).config


def test_reading_changes_nothing(folder: Path) -> None:
    before = {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")}
    run = RunFolder.read(folder)
    _ = run.config, run.env, run.summary, run.metrics(), run.samples(), run.checkpoint_steps()
    assert {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")} == before


def test_prepared_data_are_made_anew_for_other_settings(tmp_path: Path) -> None:
    """A batch size that the text is too short for is found only when the text has been prepared."""
    RunFolder.open(tmp_path / "run", {"batch_size": 4096}).close()
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "tokens.bin").write_bytes(b"tokens")
    RunFolder.open(tmp_path / "run", {"batch_size": 4096}).close()
    assert (tmp_path / "run" / "data" / "tokens.bin").exists()
    run = RunFolder.open(tmp_path / "run", {"batch_size": 8})
    assert run.config == {"batch_size": 8}
    assert not (tmp_path / "run" / "data").exists()
    run.close()
