"""The whole tour with everything as small as it goes: all stages run, the end is told, and again all is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.run import read_recipe, recipe_folder

Command = Callable[..., Any]
SHORT = "prompts=short,max_tokens=8,temperature=1.0"
LINES = f"steps=lines,{SHORT}"
PLAIN = "prompts=plain,max_tokens=4,temperature=0.0"
SMALL = {
    "pretrain": "data=[TEXT] steps=2 vocab_size=300 sequence_length=128 batch_size=2 micro_batch_size=2 warmup_steps=1 "
    "eval_every=0 compile='off'",
    "estimate": "max_bytes=500 baselines=[gzip,xz]",
    "tokens": "max_bytes=300",
    "compress": "files=[TEXT] model=none",
    "quantize": "epochs=[1,1] samples=2 validation_samples=1 sequence_length=32",
    "compare": "max_bytes=500",
    "rounded": "samples=1 validation_samples=1 sequence_length=32",
    "rounded-compare": "max_bytes=500",
    "problems": "lessons=60 test=3 lengths=[1,2] test_lengths=[2]",
    "reasoner": "steps=1 warmup_steps=1 vocab_size=1024 batch_size=2 micro_batch_size=2 held_out=0.1",
    "reasoning": f"tasks=['@problems/test-2.jsonl'] method=['cot:{SHORT}','ssr:{LINES}'] equal_to=ssr:{LINES}",
    "solve": f"method=ssr:{LINES}",
    "word-problems": "stage1=3000 stage2=3000 held_out=1000 chat=60 preferences=4 prompts=8 test=4 vocab_size=300",
    "sft": "steps=1 batch_size=2 micro_batch_size=2",
    "after-sft": f"method=['cot:{PLAIN}']",
    "mathrl": "steps=1 batch_size=2 rollout_prompts=2 generations=2 max_lengths=[96,4]",
    "after-rl": f"method=['cot:{PLAIN}']",
    "prompts": "prompts=brackets:24",
    "teacher": "samples=1",
    "student": "data=[TEXT] held_out=0.1 steps=1 warmup_steps=1 batch_size=2 micro_batch_size=2",
    "seqkd": "steps=1 batch_size=2 micro_batch_size=2",
    "distill": "batch_size=2 steps=[1,1] discriminator_alone=0 generations=2",
    "gauge": "samples=1",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_tour_runs_and_is_done_when_it_is_repeated(
    luthier: Command, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("COLUMNS", "100")
    changes = [f"{name}.{change}" for name, text in SMALL.items() for change in text.split()]
    command = ["tour", "--out", tmp_path / "tour", "--set", *(c.replace("TEXT", str(text_file)) for c in changes)]
    outcome = luthier(*command)
    assert outcome.code == 0, outcome.err
    stages = read_recipe(recipe_folder() / "tour.yaml", tmp_path / "tour")
    assert all(json.loads(stage.done.read_text())["processor_seconds"] >= 0 for stage in stages)
    for system in ("train ·", "entropy ·", "quantize ·", "train further ·", "reason ·", "distill ·"):
        assert f"\n{system}" in outcome.out
    for page in ("report.html", "04-tokens/page.html", "14-trace/trace.html"):
        assert (tmp_path / "tour" / page).is_file()
        assert page in outcome.out
    again = luthier(*command)
    assert again.err.count("done before, skipped") == len(stages)
    assert again.out.partition("What the first model")[2] == outcome.out.partition("What the first model")[2]
