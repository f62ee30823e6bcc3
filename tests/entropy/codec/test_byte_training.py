"""Training the byte-level network: it learns, resumes to the same weights, and becomes integers that say the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.cli.main import main
from luthier.entropy.codec.byte_config import TrainCodecConfig
from luthier.entropy.codec.byte_model import ByteModel
from luthier.entropy.codec.byte_training import (
    ByteLoss,
    as_bytes,
    break_lines,
    float_bits,
    optimizer_of,
    sent_dims,
    streams_of,
    training_batch,
)
from luthier.entropy.codec.integer_network import IntegerNetwork

SMALL = {"width": 32, "hidden": 64, "head_width": 16, "window": 16, "layers": 2, "heads": 2}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
OPTIONS += ["--table-bits", "6", "7", "7", "7", "7", "--sequence-length", "48", "--warmup-steps", "5"]
OPTIONS += ["--checkpoint-every", "20", "--eval-every", "0", "--eval-tokens", "1500", "--held-out", "0.2", "--json"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with words to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["copper", "fiddle", "spruce", "bridge", "peg", "and", "the", "varnish"]
    for number in range(12):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 200)) + ".\n", encoding="utf-8")
    return folder


def last_json(text: str) -> dict[str, object]:
    return json.loads(text[text.index("{") :])


def test_the_verb_trains_resumes_and_writes_integers(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: str, *more: str) -> tuple[int, str]:
        code = main(["train-codec", "--data", str(corpus), "--out", str(tmp_path / out), "--steps=60", *OPTIONS, *more])
        return code, capsys.readouterr().out

    code, printed = train("straight")
    assert code == 0
    scores = last_json(printed)
    assert scores["integer"] < 2.5  # eight words of six letters: about half a bit; with no training eight
    assert abs(scores["integer"] - scores["float"]) < 0.02 * scores["float"]
    network = IntegerNetwork.load(tmp_path / "straight" / "network.bin")
    assert network.sha256 == scores["sha256"]
    assert network.weights.provenance["data"][0]["sha256"]
    assert train("stopped", "--stop-after", "20")[0] != 0
    assert train("stopped")[0] == 0
    resumed = IntegerNetwork.load(tmp_path / "stopped" / "network.bin")
    for name, array in network.weights.arrays.items():
        np.testing.assert_array_equal(resumed.weights.arrays[name], array)


def test_the_verb_trains_with_codes_and_files_come_back(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, coding = tmp_path / "run", ["--code-dims", "2", "--code-levels", "2"]
    code = main(["train-codec", "--data", str(corpus), "--out", str(out), "--steps=40", *OPTIONS, *coding])
    printed = capsys.readouterr().out
    assert code == 0
    row = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["piece_bits_of_code"] == 2 / 48
    assert 0 < row["piece_bits_given_code"] != row["piece_bits"] < 8
    network = IntegerNetwork.load(out / "network.bin")
    assert (network.dims, network.levels) == (2, 2)
    assert network.sha256 == last_json(printed)["sha256"]
    assert network.weights.provenance["config"]["code_share"] == 0.5
    text, file = b"copper and the varnish, fiddle and spruce. " * 20, tmp_path / "text"
    file.write_bytes(text)
    for command in (["compress", "text"], ["verify", "text.lut"], ["decompress", "text.lut", "-f"]):
        arguments = [command[0], str(tmp_path / command[1]), *command[2:], "--model", str(out / "network.bin")]
        assert main(arguments) == 0
    assert file.read_bytes() == text


def test_a_code_says_what_the_past_cannot() -> None:
    """Sequences of dots with one of two letters, twice: a bit that nothing before tells, but for the first letter."""
    config = TrainCodecConfig(**{**SMALL, "layers": 1}, table_bits=(4,) * 5, code_dims=1, code_levels=2)
    model = ByteModel(config.model())
    model.initialize(0)
    number = torch.arange(16)
    ids = torch.full((16, 41), 46)
    ids[:, 19::19] = 65 + number[:, None] % 2
    assert model.segment is not None
    model.segment.center(ids)
    loss, optimizer = ByteLoss(model), optimizer_of(model, replace(config, learning_rate=0.02))
    for _ in range(150):
        loss(ids[:, :-1], ids[:, 1:], number // 2 % 2).div(16 * 40).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nats = [loss(ids[:, :-1], ids[:, 1:], torch.full_like(number, sent)).item() for sent in (0, 1)]
    gain = (nats[0] - nats[1]) / 16 / math.log(2)
    assert gain == pytest.approx(1, abs=0.1)  # bits a sequence


def test_a_run_from_before_there_were_codes_is_resumed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml has no settings of codes, and neither has one of today without codes."""
    run = ["train-codec", "--data", str(corpus), "--out", str(tmp_path / "run"), "--steps=6", *OPTIONS]
    assert main([*run, "--stop-after=2"]) == 130
    assert "code_" not in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert main([*run, "--code-dims=1"]) == 2
    assert "holds a run with another config: code_dims: (absent) -> 1" in capsys.readouterr().err
    assert main(run) == 0


def test_some_sequences_are_given_a_code() -> None:
    config = TrainCodecConfig(**SMALL, batch_size=64, code_dims=3, code_share=0.75)
    sent = np.concatenate([sent_dims(config, step) for step in range(20)])
    np.testing.assert_array_equal(sent[:64], sent_dims(config, 0))
    assert np.bincount(sent, minlength=4) / len(sent) == pytest.approx([0.25] * 4, abs=0.05)
    assert len({tuple(sent_dims(config, step)) for step in range(20)}) == 20


def test_ends_of_documents_are_read_as_newlines_and_not_predicted() -> None:
    model = ByteModel(TrainCodecConfig(**SMALL).model())
    model.initialize(0)
    loss = ByteLoss(model)
    ids = torch.tensor([[65, 66, 256, 67]])
    assert as_bytes(ids).tolist() == [[65, 66, 10, 67]]
    targets = torch.tensor([[66, 256, 67, 68]])
    parts = [loss(ids, targets.where(torch.arange(4) == i, -100)).item() for i in range(4)]
    assert parts[1] == 0
    assert min(parts[0], *parts[2:]) > 1
    assert loss(ids, targets).item() == pytest.approx(sum(parts))


def test_both_forms_charge_every_byte() -> None:
    text = streams_of(np.array([*range(200), 256, *range(100)]), 280)
    assert text.shape == (8, 35)
    assert text.ravel().tolist() == [*range(200), *range(80)]
    model = ByteModel(TrainCodecConfig(**SMALL).model())
    model.initialize(0)
    model.head.weight.data.zero_()  # so that every byte costs eight bits
    assert float_bits(model, text) == pytest.approx(8)
    assert streams_of(np.arange(5), 100).shape == (5, 1)


def test_lines_are_broken_at_spaces_and_nowhere_else() -> None:
    text = np.frombuffer(b"aaa bb cccc d eeeeeeeeeeee ff\ngg hh iii jj", np.uint8).astype(np.int64)
    broken = text.copy()
    break_lines(broken, 8)
    assert bytes(broken.tolist()) == b"aaa bb\ncccc d\neeeeeeeeeeee\nff\ngg hh\niii jj"
    later = text.copy()
    break_lines(later, 8, column=4)
    assert bytes(later.tolist()).startswith(b"aaa\nbb cccc\nd")


def test_the_sequences_of_a_step_depend_on_the_step_alone() -> None:
    row = np.frombuffer(b"some words that go on and on " * 20, np.uint8).astype(np.int64)[:481]

    class Same:
        def batch(self, step: int) -> dict[str, np.ndarray]:
            rows = np.tile(row, (8, 1))
            return {"input_ids": rows[:, :-1], "targets": rows[:, 1:]}

    config = TrainCodecConfig(**SMALL, sequence_length=480)
    first, again, other = (training_batch(Same(), config, step) for step in (3, 3, 4))  # type: ignore[arg-type]
    np.testing.assert_array_equal(first["input_ids"], again["input_ids"])
    np.testing.assert_array_equal(first["input_ids"][:, 1:], first["targets"][:, :-1])
    assert (first["input_ids"] != other["input_ids"]).any()
    broken = [(ids == 10).any() for ids in [*first["input_ids"], *other["input_ids"]]]
    assert 2 < sum(broken) < 14
    for ids in first["input_ids"]:
        changed = ids != row[:-1]
        assert set(ids[changed].tolist()) <= {10}
        assert set(row[:-1][changed].tolist()) <= {32}


def test_only_matrices_decay() -> None:
    config = TrainCodecConfig(**SMALL, code_dims=2)
    model = ByteModel(config.model())
    decayed, kept = optimizer_of(model, config).param_groups
    assert decayed["weight_decay"] == config.weight_decay
    assert kept["weight_decay"] == 0
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(weight)].split(".")[0] for weight in decayed["params"]} == {"blocks", "head", "segment"}
    assert all(names[id(weight)].startswith(("tables.", "blocks.", "segment.")) for weight in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
