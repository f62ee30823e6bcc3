from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import word_problems
from luthier.cli.word_problems import WordProblemsConfig
from luthier.core.errors import DataError
from luthier.data.formats import read_rows
from luthier.data.word_problems import WordProblem

KINDS = {
    **dict.fromkeys(("stage1", "stage2", "stage2-held-out", "stories-held-out", "problems-held-out"), "text"),
    "chat": "messages",
    **dict.fromkeys(("preferences", "preferences-test"), "preference"),
    **dict.fromkeys(("prompts", "test-questions", "test-pairs"), "answer"),
}
SMALL = [
    *("--stage1", "60000", "--stage2", "30000", "--chat", "150", "--preferences", "40", "--prompts", "60"),
    *("--test", "50", "--held-out", "5000"),
]


@pytest.fixture(scope="module")
def made(luthier: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("word-problems") / "a"
    outcome = luthier("word-problems", *SMALL, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    return out, json.loads(outcome.out)


def test_every_file_is_of_its_kind(made: tuple[Path, dict[str, Any]]) -> None:
    out, result = made
    assert set(result["files"]) == {f"{name}.jsonl" for name in KINDS}
    for name, kind in KINDS.items():
        rows = list(read_rows(out / f"{name}.jsonl", kind))
        assert len(rows) == result["files"][f"{name}.jsonl"]["rows"] > 0
    assert all(count["hits"] == count["whole"] == 0 for count in result["contamination"].values())
    assert result["contamination"]["test-pairs.jsonl"]["rows"] == 50


def test_equal_settings_give_equal_files(
    made: tuple[Path, dict[str, Any]], luthier: Callable[..., Any], tmp_path: Path
) -> None:
    out, result = made
    again = luthier("word-problems", *SMALL, "--out", tmp_path / "b", "--json")
    assert json.loads(again.out) == result
    other = luthier("word-problems", *SMALL, "--out", tmp_path / "c", "--seed", 1)
    assert other.code == 0, other.err
    assert "test-pairs.jsonl" in other.out
    tokenizers = [(folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in (out, tmp_path / "b")]
    assert tokenizers[0] == tokenizers[1]
    assert (tmp_path / "c" / "prompts.jsonl").read_bytes() != (out / "prompts.jsonl").read_bytes()


def test_tests_are_unseen(made: tuple[Path, dict[str, Any]]) -> None:
    out, _ = made
    trained = "".join((out / f"{n}.jsonl").read_text() for n in ("stage1", "stage2", "chat", "preferences", "prompts"))
    for name in ("test-questions", "test-pairs"):
        assert not any(row["prompt"] in trained for row in read_rows(out / f"{name}.jsonl"))
    held = [row["text"] for row in read_rows(out / "stage2-held-out.jsonl")]
    assert not any(json.dumps(text)[1:-1] in trained for text in held)


def test_the_tokenizer_keeps_digits_apart_and_knows_the_chat_format(made: tuple[Path, dict[str, Any]]) -> None:
    from luthier.data.template import render
    from luthier.data.tokenizer import encode_texts, is_lossless, load_tokenizer, num_ids

    tokenizer = load_tokenizer(made[0] / "tokenizer", needs_padding=True)
    assert num_ids(tokenizer) == 512
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]
    (ids,) = encode_texts(tokenizer, ["12 + 345 = 357\n#### 357"])
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == list("12345357357")
    assert is_lossless(tokenizer)
    messages = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "#### 7"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(messages)
    assert tokenizer.eos_token_id not in encode_texts(tokenizer, ["<|user|>\n<|endoftext|>"])[0]


def test_a_leak_stops_the_verb(luthier: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = word_problems._Maker.draw

    def leaky(self: Any, purpose: str, split: Any = "train", *, variants: int = 0) -> Any:
        if purpose == "prompts.jsonl":
            first = self.questions["test-pairs.jsonl"][0]
            return iter([WordProblem(f"So. {first}", next(iter(draw(self, purpose))).expression)] * 60)
        return draw(self, purpose, split, variants=variants)

    monkeypatch.setattr(word_problems._Maker, "draw", leaky)
    outcome = luthier("word-problems", *SMALL, "--out", tmp_path / "x")
    assert outcome.code == 2
    assert outcome.error.startswith("1 rows of test-pairs.jsonl are in a training file")
    assert not (tmp_path / "x" / "stage1.jsonl").exists()


def test_a_held_out_calculation_in_training_is_refused() -> None:
    config = WordProblemsConfig()
    story: list[dict[str, Any]] = [{"text": "2 + 5 = 7", "part": "problem"}]
    training = {"stage1.jsonl": story, "stage2.jsonl": story}
    with pytest.raises(DataError, match=r"held-out calculations .* 2 \+ 5"):
        word_problems._check(config, training, {"stories-held-out.jsonl": []}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--operands", 2, 3), "operands: got (2, 3)"),
        (("--held-pairs", 0), "held_pairs: got 0"),
        (("--bare", 2), "bare: got 2"),
        (("--chat", 0), "chat: got 0"),
    ],
)
def test_bad_settings_are_named(
    luthier: Callable[..., Any], tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    assert luthier("word-problems", *options, "--out", tmp_path).error.startswith(message)
