"""Models in lm-evaluation-harness: the same numbers as luthier's own scoring and generation, from a folder."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.cli.lm_eval import main
from luthier.data.chat import render
from luthier.data.tokenizer import load_tokenizer, train_bpe
from luthier.llm.local import LocalModel
from luthier.llm.types import Request
from luthier.models.initialization import initialize
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import sized_config
from luthier.models.load import load_pretrained, save_pretrained
from luthier.tasks.likelihood import read_items
from luthier.tasks.likelihood_metrics import chosen, measured
from luthier.tasks.likelihood_runner import score_task

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness's own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PAIRS = [
    ("the luthier planes", " the top until it rings"),
    ("", "maple"),
    ("spruce ", "bow"),  # the harness moves the space to the second text
    ("tap wood of the violin", " rings.\n\nthe bow"),
    ("<|endoftext|>the top", " of the violin"),
]
PROMPTS = ["the luthier", "maple bow spruce tap the violin until", "it", "of wood"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A random Instella whose embedding has rows that the tokenizer does not know and that it would like to write."""
    tokenizer: PreTrainedTokenizerFast = train_bpe([text_file.read_text()], 290)
    config = sized_config("nano", tokenizer, vocab_size=304, max_position_embeddings=64)
    network = InstellaForCausalLM._from_config(config, dtype=torch.float32)
    initialize(network, 3)
    with torch.no_grad():
        network.lm_head.weight.mul_(20)
        network.lm_head.weight[290:].mul_(3)
    folder = tmp_path_factory.mktemp("harness") / "model"
    save_pretrained(network, tokenizer, folder, {"verb": "test"})
    return folder


@pytest.fixture(scope="module")
def harness(folder: Path) -> Any:
    """The model as the harness makes it, with batches of three."""
    import luthier.serve.harness as registered

    assert registered.LuthierLM is not None
    from lm_eval.api.registry import get_model

    options = {"batch_size": 3, "max_batch_size": None, "device": "cpu"}
    return get_model("luthier").create_from_arg_string(f"pretrained={folder}", options)


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]  # type: ignore[arg-type]


def local_answers(folder: Path, *, prompts: Sequence[str] = (), pairs: Sequence[tuple[str, str]] = ()) -> list[Any]:
    async def ask() -> list[Any]:
        local = LocalModel(load_pretrained(folder), load_tokenizer(folder))
        requests = [Request(prompt=prompt, max_tokens=8, temperature=0, stop=["\n"]) for prompt in prompts]
        written = [answers[0].text for answers in await asyncio.gather(*map(local.complete, requests))]
        scores = await asyncio.gather(*(local.score(*pair) for pair in pairs))
        await local.aclose()
        return [*written, *scores]

    return asyncio.run(ask())


def test_loglikelihood_is_that_of_our_own_scorer(harness: Any, folder: Path) -> None:
    found = harness.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    own_pairs = [
        (context.rstrip(" "), " " * (len(context) - len(context.rstrip(" "))) + text) for context, text in PAIRS
    ]
    for (logprob, greedy), score in zip(found, local_answers(folder, pairs=own_pairs), strict=True):
        assert logprob == pytest.approx(score.logprob, rel=2e-6, abs=1e-4)
        assert not greedy or score.greedy


def test_generation_is_our_own_greedy_one_in_any_batch(harness: Any, folder: Path) -> None:
    """Prompts of unequal length share left-padded batches; padding is id 1, BOS and EOS are id 0."""
    assert (harness.tokenizer.pad_token_id, harness.eot_token_id, harness.prefix_token_id) == (1, 0, 0)
    how = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    found = harness.generate_until(asked("generate_until", [(p, how) for p in PROMPTS]), disable_tqdm=True)
    assert found == local_answers(folder, prompts=PROMPTS)
    alone = [harness.generate_until(asked("generate_until", [(p, how)]), disable_tqdm=True)[0] for p in PROMPTS]
    assert found == alone
    assert any(found)


def test_the_chat_template_is_instellas_with_one_beginning(harness: Any) -> None:
    messages = [{"role": "user", "content": "the top"}]
    text = harness.apply_chat_template(messages)
    assert text == render(messages, add_generation_prompt=True)
    ids = harness.tok_encode(text)
    assert (ids[0], ids.count(0)) == (0, 1)


def test_whole_documents_are_charged_from_their_beginning(harness: Any, folder: Path) -> None:
    text = "the luthier planes the top until it rings"
    (total,) = harness.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    (score,) = local_answers(folder, pairs=[("", text)])
    assert total == pytest.approx(score.logprob, rel=2e-6, abs=1e-4)


YAML = """
task: planks
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


def test_a_task_of_the_harness_gives_the_accuracy_of_our_own(harness: Any, folder: Path, tmp_path: Path) -> None:
    """From the YAML of a task to its results, offline: as `luthier eval` on the same file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {"context": f"the {word}", "choices": ["until it rings", "taps", "of wood"], "label": n % 3}
        for n, word in enumerate(["top", "bow", "violin", "luthier", "maple", "spruce", "wood"])
    ]
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "planks.yaml").write_text(YAML.format(items=items, cache=tmp_path / "cache"))
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(harness, tasks=["planks"], task_manager=tasks, bootstrap_iters=0)
    assert found is not None

    async def score() -> list[dict[str, Any]]:
        local = LocalModel(load_pretrained(folder), load_tokenizer(folder))
        own = await score_task(read_items(items), local, tmp_path / "answers.jsonl")
        await local.aclose()
        return own

    own = asyncio.run(score())
    for name, measure in (("acc,none", "sum"), ("acc_bytes,none", "byte")):
        right = [chosen(measured(row)[measure]) == row["gold"] for row in own]
        assert found["results"]["planks"][name] == pytest.approx(sum(right) / len(rows))


def test_the_command_is_the_harness_with_one_more_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.__main__
    from lm_eval.api.registry import model_registry

    seen: list[bool] = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append("luthier" in model_registry))
    assert main() == 0
    assert seen == [True]


def test_a_folder_that_is_none_is_told_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.__main__

    def start() -> None:
        get_model("luthier").create_from_arg_string("pretrained=./no-such-folder")

    from lm_eval.api.registry import get_model

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", start)
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[0] == "luthier: ./no-such-folder: no such model folder"


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from luthier.cli.lm_eval import main
raise SystemExit(main())
"""


def test_without_the_harness_the_command_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 2
    message, hint = done.stderr.splitlines()
    assert message == "luthier: this needs the package lm-eval, which is not installed"
    assert hint == "  hint: pip install lm-eval"
