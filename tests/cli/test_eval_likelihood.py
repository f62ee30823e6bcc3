"""`luthier eval --tasks` where texts are scored: the same as a naive loop, whatever shares a batch."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.cli.eval import EvalConfig, run
from luthier.core.console import Console
from luthier.core.errors import ConfigError, DataError
from luthier.core.files import read_jsonl, sha256_file
from luthier.core.run import RunFolder
from luthier.data.tokenizer import train_bpe
from luthier.llm.local import LocalModel
from luthier.llm.types import Request
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config
from luthier.models.load import save_pretrained
from luthier.tasks.likelihood import read_items
from luthier.tasks.likelihood_runner import score_task

WORDS = ["spruce", "maple", "top", "bow", "rings", "until", "planes", "softly", "luthier", "wood"]


@pytest.fixture(scope="module")
def tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    return train_bpe([text_file.read_text()], 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> InstellaForCausalLM:
    """Random, far from uniform, with four rows of the embedding that the tokenizer does not know."""
    config = sized_config("nano", tokenizer, vocab_size=304, max_position_embeddings=96)
    network = InstellaForCausalLM._from_config(config, dtype=torch.float32)
    initialize(network, 7)
    with torch.no_grad():
        network.lm_head.weight.mul_(20)
    return network.eval()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A model's folder, beside files of items of every kind."""
    folder, draw = tmp_path_factory.mktemp("likelihood"), random.Random(0)
    save_pretrained(model, tokenizer, folder / "model", {"verb": "test"})

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    choices = [
        {"context": words(9), "choices": [words(4) for _ in range(3)], "label": n % 3, "metadata": {"half": n % 2}}
        for n in range(12)
    ]
    rows = {
        "choice": choices,
        "pair": [{"good": words(9), "bad": words(9)} for _ in range(8)],
        "target": [{"context": "" if n == 0 else words(9), "target": words(2)} for n in range(8)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def evaluate(folder: Path, out: Path, *tasks: str, **settings: Any) -> dict[str, Any]:
    text = io.StringIO()
    names = tuple(str(folder / f"{task}.jsonl") for task in tasks)
    values: dict[str, Any] = {"model": str(folder / "model"), "tasks": names, "device": "cpu", "out": out}
    run(EvalConfig(**{**values, **settings}), Console(as_json=True, out=text, err=io.StringIO()))
    found: dict[str, Any] = json.loads(text.getvalue())["tasks"]
    return found


Naive = Callable[[str, str], tuple[float, int, bool]]


@pytest.fixture(scope="module")
def naive(model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Naive:
    """(context, text) -> log-probability, tokens, and whether they are the likeliest: one text a pass, no cache."""

    @functools.cache
    @torch.no_grad()
    def score(context: str, text: str) -> tuple[float, int, bool]:
        before = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
        after = tokenizer(context + text)["input_ids"][len(before) if context else 0 :]
        logits = model(torch.tensor([[*before, *after]])).logits[0].double()
        total, greedy = 0.0, True
        for place, token in enumerate(after, len(before) - 1):
            total += float(logits[place].log_softmax(-1)[token])
            greedy &= int(logits[place, : len(tokenizer)].argmax()) == token
        return total, len(after), greedy

    return score


@pytest.mark.parametrize("kind", ["choice", "pair", "target"])
@pytest.mark.parametrize(("size", "side"), [(1, "left"), (5, "left"), (32, "right")])
def test_scores_are_those_of_a_naive_loop_in_any_batch(
    folder: Path,
    tmp_path: Path,
    model: InstellaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    naive: Naive,
    kind: str,
    size: int,
    side: str,
) -> None:
    task = read_items(folder / f"{kind}.jsonl")

    async def measure() -> list[dict[str, Any]]:
        local = LocalModel(model, tokenizer, max_batch_size=size)
        try:
            return await score_task(task, local, tmp_path / "answers.jsonl", unconditional=True)
        finally:
            await local.aclose()

    usual, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        rows = asyncio.run(measure())
    finally:
        tokenizer.padding_side = usual
    for row, item in zip(rows, task.items, strict=True):
        for place, option in enumerate(item.options):
            logprob, count, greedy = naive(option.context, option.text)
            assert row["logprobs"][place] == pytest.approx(logprob, rel=2e-6, abs=1e-4)
            assert (row["tokens"][place], row["greedy"][place]) == (count, greedy)
            alone = naive("", option.text)[0]
            assert row["unconditional"][place] == pytest.approx(alone, rel=2e-6, abs=1e-4)


def test_what_the_model_would_write_is_greedy_and_nothing_else(
    model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    async def ask() -> list[bool | None]:
        local = LocalModel(model, tokenizer)
        request = Request(prompt="the top", max_tokens=3, temperature=0, logprobs=True)
        (answer,) = await local.complete(request)
        scores = [await local.score("the top", answer.text), await local.score("the top", answer.text + "~")]
        await local.aclose()
        assert [t.token_id for t in scores[0].tokens] == [t.token_id for t in answer.logprobs or ()]
        return [score.greedy for score in scores]

    assert asyncio.run(ask()) == [True, False]


def test_accuracy_is_that_of_the_rows(folder: Path, tmp_path: Path) -> None:
    found = evaluate(folder, tmp_path / "run", "choice", "pair", "target", unconditional=True)
    rows = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert len(rows) == 12 + 8 + 8
    for task, count, measures in (("choice", 12, 4), ("pair", 8, 3), ("target", 8, 1)):
        result = found[task]["likelihood"]
        correct = sum(row["status"] == "correct" for row in rows if row["task"] == task)
        assert result["accuracy"]["value"] == pytest.approx(correct / count)
        assert result["accuracy"]["n"] == count
        assert result["accuracy"]["low"] <= correct / count <= result["accuracy"]["high"]
        assert len(result["measures"]) == measures
    by_sum = [max(range(3), key=lambda n: row["logprobs"][n]) == row["gold"] for row in rows if row["task"] == "choice"]
    assert found["choice"]["likelihood"]["measures"]["sum"]["value"] == pytest.approx(sum(by_sum) / 12)
    assert found["choice"]["likelihood"]["chance"] == pytest.approx(1 / 3)
    assert found["target"]["likelihood"]["perplexity"]["value"] > 1
    summary = RunFolder.read(tmp_path / "run").summary
    assert [table["title"].partition(":")[0] for table in summary["tables"]] == ["choice", "pair", "target"]
    assert summary["headline"]["pair, likelihood"].endswith("] by sum")


def test_rerunning_resumes_and_equals_a_straight_run(folder: Path, tmp_path: Path) -> None:
    straight = evaluate(folder, tmp_path / "a", "choice")
    evaluate(folder, tmp_path / "b", "choice", limit=5)
    before = (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert evaluate(folder, tmp_path / "b", "choice") == straight
    after = (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert after.startswith(before)  # rows are only ever appended
    assert after.count(b"\n") == 12
    evaluate(folder, tmp_path / "b", "choice")
    assert (tmp_path / "b" / "answers.jsonl").read_bytes() == after


def test_examples_and_groups(folder: Path, tmp_path: Path) -> None:
    plain = evaluate(folder, tmp_path / "run", "choice", by="half")
    tables = RunFolder.read(tmp_path / "run").summary["tables"]
    assert [line[0] for line in tables[1]["rows"]] == ["0"] * 3 + ["1"] * 3
    shown = evaluate(folder, tmp_path / "run", "choice", shots=1)
    assert list(shown["choice"]) == ["likelihood, 1 shots"]
    assert shown["choice"]["likelihood, 1 shots"]["sha256"] != plain["choice"]["likelihood"]["sha256"]
    with pytest.raises(ConfigError, match=r"shots_from: .* holds pair rows, but choice is of the kind choice"):
        evaluate(folder, tmp_path / "run", "choice", shots=1, shots_from=folder / "pair.jsonl")
    evaluate(folder, tmp_path / "other", "choice", shots=2, shots_from=folder / "choice.jsonl")


def test_items_that_do_not_fit_are_counted_and_told(folder: Path, tmp_path: Path) -> None:
    found = evaluate(folder, tmp_path / "run", "choice", shots=9)
    result = found["choice"]["likelihood, 9 shots"]
    assert result["failed"] == 12
    assert result["accuracy"]["value"] == 0
    assert "exceed the context of 96 tokens" in read_jsonl(tmp_path / "run" / "answers.jsonl")[0]["error"]


def test_weights_that_changed_are_measured_again(
    folder: Path, tmp_path: Path, model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_pretrained(model, tokenizer, tmp_path / "model", {"verb": "test"})
    settings = {"model": str(tmp_path / "model")}
    evaluate(folder, tmp_path / "run", "pair", **settings)
    other = InstellaForCausalLM._from_config(model.config, dtype=torch.float32)
    initialize(other, 8)
    save_pretrained(other, tokenizer, tmp_path / "model", {"verb": "test"})
    evaluate(folder, tmp_path / "run", "pair", **settings)
    rows = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert len(rows) == 16
    assert rows[0]["model"] != rows[-1]["model"]


def test_two_models_are_compared_on_the_same_items(
    folder: Path, tmp_path: Path, model: InstellaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = InstellaForCausalLM._from_config(model.config, dtype=torch.float32)
    initialize(other, 8)
    save_pretrained(other, tokenizer, tmp_path / "model", {"verb": "test"})
    evaluate(folder, tmp_path / "a", "pair", "choice")
    evaluate(folder, tmp_path / "b", "pair", model=str(tmp_path / "model"), against=tmp_path / "a")
    table = RunFolder.read(tmp_path / "b").summary["tables"][-1]
    ((task, method, n, this, that, only_this, only_that, p),) = table["rows"]
    rows = [read_jsonl(tmp_path / name / "answers.jsonl") for name in "ba"]
    right = [{r["problem"] for r in some if r["task"] == "pair" and r["status"] == "correct"} for some in rows]
    assert (task, method, n) == ("pair", "likelihood", "8")
    assert (float(this), float(that)) == pytest.approx((len(right[0]) / 8, len(right[1]) / 8), abs=1e-3)
    assert (int(only_this), int(only_that)) == (len(right[0] - right[1]), len(right[1] - right[0]))
    assert 0 < float(p) <= 1
    with pytest.raises(DataError, match="no answers to the same problems"):
        evaluate(folder, tmp_path / "c", "target", against=tmp_path / "a")


def test_tasks_of_both_sorts_in_one_command(folder: Path, tmp_path: Path) -> None:
    path = folder / "sums.jsonl"
    path.write_text('{"prompt": "1+1?", "answer": "2"}\n')
    method = "cot:max_tokens=4,prompts=short"
    found = evaluate(folder, tmp_path / "run", "pair", "sums", method=(method,))
    assert set(found["pair"]) == {"likelihood"}
    assert found["sums"][method]["accuracy"]["n"] == 1
    assert found["sums"][method]["statuses"].get("failed", 0) == 0
    long = evaluate(folder, tmp_path / "long", "sums", method=("cot:max_tokens=4",))  # its prompt is
    assert long["sums"]["cot:max_tokens=4"]["statuses"] == {"failed": 1}
    with pytest.raises(ConfigError, match="no task takes examples"):
        evaluate(folder, tmp_path / "other", "sums", shots=1)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns) for path in files}


def test_evaluation_never_changes_what_it_measures(
    trained: Path, text_file: Path, tmp_path: Path, luthier: Callable[..., Any]
) -> None:
    """A finished run stays as it is to the last file, whatever --out says."""
    before, model = contents(trained), trained / "model"
    assert any(name.endswith(".safetensors") for name in before)
    items = tmp_path / "pair.jsonl"
    items.write_text('{"good": "the top", "bad": "top the"}\n')
    text = ["eval", model, "--data", text_file, "--device", "cpu", "--max-bytes", "200"]
    tasks = ["eval", model, "--tasks", items, "--device", "cpu"]
    for command in (text, tasks):
        outcome = luthier(*command, "--out", tmp_path / command[1].name / command[2][2:])
        assert outcome.code == 0, outcome.err
        assert contents(trained) == before
        for out in (trained, model, model / "eval", trained / "checkpoints", trained / "data"):
            refused = luthier(*command, "--out", out)
            assert refused.code == 2, out
            assert refused.error
            assert contents(trained) == before
    assert "lies in the model's folder" in luthier(*tasks, "--out", model / "eval").error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 1}, "shots: only tasks take that"),
        ({"unconditional": True}, "unconditional: only tasks take that"),
        ({"tasks": ("cloze",), "shots": -1}, "shots must be"),
        ({"tasks": ("cloze",), "shots_from": Path("x")}, "shots must be"),
        ({"tasks": ("cloze",), "out": Path("m/eval")}, "lies in the model's folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**{"model": "m", "out": Path("runs/x"), **settings})


def test_two_tasks_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pair.jsonl").write_text('{"good": "a b", "bad": "b a"}\n')
    with pytest.raises(ConfigError, match="two are called 'pair'"):
        evaluate(folder, tmp_path / "run", "pair", tasks=(str(folder / "pair.jsonl"), str(tmp_path / "pair.jsonl")))


def test_a_text_task_runs_from_the_command_line(
    trained: Path, tmp_path: Path, luthier: Callable[..., Any], text_file: Path
) -> None:
    prose = tmp_path / "prose.txt"
    draw = random.Random(3)
    lines = [[*draw.choices(WORDS, k=draw.randint(9, 12))] for _ in range(40)]
    prose.write_text("\n\n".join(" ".join([a.title(), *rest]) + "." for a, *rest in lines))
    command = ["eval", trained / "model", "--tasks", f"cloze:{prose}", "--limit", "3", "--device", "cpu"]
    outcome = luthier(*command, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"cloze:{prose}: 3 items")
