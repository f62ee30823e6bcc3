"""Training stops and resumes bit by bit, does not depend on micro-batches, and never logs a loss without the code."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoTokenizer

from luthier.core.config import build
from luthier.core.errors import ConfigError
from luthier.data.tokenizer import byte_tokenizer, encode_texts, is_lossless
from luthier.entropy.config import TrainEemConfig
from luthier.entropy.network import load_entropy_model
from luthier.entropy.training import CodeLengthLoss, build_model, train_eem, training_batch
from luthier.learn.parallel import Ranks

Command = Callable[..., Any]
TINY = {
    "window": 32,
    "encoder-width": 16,
    "decoder-width": 16,
    "encoder-layers": 1,
    "decoder-layers": 1,
    "heads": 2,
    "batch-size": 8,
    "micro-batch-size": 8,
    "steps": 6,
    "warmup-steps": 2,
    "device": "cpu",
    "precision": "fp32",
    "log-every": 1,
    "checkpoint-every": 2,
    "eval-every": 3,
    "eval-segments": 8,
}


class Same:
    """The same eight segments at every step."""

    def batch(self, step: int) -> dict[str, NDArray[np.int64]]:
        return {"input_ids": np.arange(8 * 32).reshape(8, 32) % 257}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def arguments(out: Path, data: Path, **changes: object) -> list[str]:
    settings = {**TINY, "out": out, "data": data, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return ["train-eem", *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(luthier: Command, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eem") / "straight"
    outcome = luthier(*arguments(out, text_file))
    assert outcome.code == 0, outcome.err
    assert "everything charged" in outcome.out
    return out


def test_stopped_and_resumed_is_straight(luthier: Command, text_file: Path, straight: Path, tmp_path: Path) -> None:
    first = luthier(*arguments(tmp_path / "run", text_file, stop_after=3))  # between two checkpoints
    assert first.code == 130
    assert "state saved" in first.error
    assert luthier(*arguments(tmp_path / "run", text_file)).code == 0
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(tmp_path / "run")[name], tensor), name
    for kind in ("train", "eval"):
        assert [row["loss"] for row in rows(tmp_path / "run", kind)] == [row["loss"] for row in rows(straight, kind)]


def test_micro_batches_change_nothing(luthier: Command, text_file: Path, straight: Path, tmp_path: Path) -> None:
    assert luthier(*arguments(tmp_path / "run", text_file, micro_batch_size=3)).code == 0
    losses = [[row["loss"] for row in rows(out, "train")] for out in (straight, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_published_noise_does_not_depend_on_micro_batches_either() -> None:
    """It is drawn for each segment, as is which segments go without their code."""
    settings = {key.replace("-", "_"): value for key, value in TINY.items()}
    config = build(TrainEemConfig, {**settings, "quantizer": "noise", "levels": 32, "noise_width": 0.5})
    batch = {name: torch.from_numpy(part) for name, part in training_batch(Same(), config, 3).items()}
    assert 0 < int(batch["replaced"].sum()) < 8
    objective = CodeLengthLoss(build_model(config, 257))
    parts = [objective(**{name: part[start : start + 3] for name, part in batch.items()}) for start in (0, 3, 6)]
    torch.testing.assert_close(objective(**batch), torch.stack(parts).sum())
    other = objective(**{**batch, "uniform": 1 - batch["uniform"]})
    assert not torch.allclose(objective(**batch), other)


def test_the_run_folder_holds_a_model_and_what_it_measured(straight: Path) -> None:
    model = load_entropy_model(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert encode_texts(tokenizer, ["ab\u00e9"]) == [list("ab\u00e9".encode())]
    provenance = json.loads((straight / "model" / "luthier.json").read_text())
    assert provenance["verb"] == "train-eem"
    figures = json.loads((straight / "summary.json").read_text())["held_out"]
    assert figures == provenance["metrics"]
    assert sum(figures["shares"].values()) == pytest.approx(figures["bits_per_byte"])
    assert figures["code_bits_per_byte"] > model.code_bits / (8 * 32) / 8
    assert (straight / "report.html").exists()


def test_no_logged_loss_leaves_out_the_code() -> None:
    """The loss of a batch is the nats of its tokens, as `nats` gives them, plus the codes that were given."""
    config = build(TrainEemConfig, {key.replace("-", "_"): value for key, value in TINY.items()})
    model = build_model(config, 257).eval()
    ids, replaced = torch.randint(0, 257, (4, 32)), torch.tensor([True, False, False, False])
    loss = CodeLengthLoss(model)(ids, ids, replaced, torch.zeros(4, 4))
    given = torch.where(replaced[:, None], model.nats(ids, None), model.nats(ids, model.encode(ids)))
    torch.testing.assert_close(loss, given.sum() + 3 * 16 * math.log(2), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("intro", ["auto", "token"])
def test_a_mixer_trains_too(luthier: Command, text_file: Path, tmp_path: Path, intro: str) -> None:
    changes = {"half": "mixer", "intro": intro, "kernel": 2, "heads": 0, "steps": 3, "eval_every": 0}
    assert luthier(*arguments(tmp_path / "run", text_file, **changes)).code == 0
    model = load_entropy_model(tmp_path / "run" / "model")
    assert model.eem.intro == ("embedding" if intro == "auto" else intro)
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]


def test_token_shards_of_one_run_feed_another(
    luthier: Command, text_file: Path, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight / "data", tmp_path / "data")
    data = tmp_path / "data"
    given = {"eval_data": data / "held-out", "tokenizer": data / "tokenizer"}
    assert luthier(*arguments(tmp_path / "run", data / "train-0", **given)).code == 0
    assert [row["loss"] for row in rows(tmp_path / "run", "train")] == [row["loss"] for row in rows(straight, "train")]


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert is_lossless(tokenizer)
    text = "".join(chr(n) for n in range(0x500))
    assert encode_texts(tokenizer, [text]) == [list(text.encode())]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (256, 256, 257)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"null_share": 1.5}, "null_share: got 1.5"),
        ({"levels": 6}, "levels: got 6, expected one of"),
        ({"half": "mixer", "padding_side": "left"}, "padding_side: a mixer sees padding"),
        ({"warmup_steps": 7}, "warmup_steps: got 7, more than the 6 steps"),
        ({"heads": 5}, "5 heads do not fit"),
    ],
)
def test_a_setting_that_cannot_be_honored_is_refused(
    luthier: Command, text_file: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    outcome = luthier(*arguments(tmp_path / "run", text_file, **changes))
    assert outcome.code == 2
    assert told in outcome.error


def test_more_than_one_rank_is_refused(tmp_path: Path) -> None:
    config = build(TrainEemConfig, {})
    given: Any = None
    with pytest.raises(ConfigError, match="one process, got 2 ranks"):
        train_eem(config, given, given, given, who=Ranks(0, 2), checkpoints=tmp_path, run=None, console=given)
