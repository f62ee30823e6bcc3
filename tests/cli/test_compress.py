"""compress, decompress, verify and info: files, pipes, refusals, and what is left behind when something goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import compress as compress_verb
from luthier.cli.archives import shipped_network
from luthier.entropy.codec.integer_weights import load
from luthier.entropy.codec.mixing import _library

pytestmark = pytest.mark.skipif(_library().code is None, reason=_library().reason)
Command = Callable[..., Any]
TEXT = b"a violin, a viola, a violoncello; \xff\r\n" * 60


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def piped(*arguments: str | Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "luthier", *map(str, arguments)], input=data, capture_output=True)


def test_there_and_back(luthier: Command, file: Path) -> None:
    os.utime(file, (1e9, 1e9))
    outcome = luthier("compress", file, "--rm")
    assert outcome.code == 0, outcome.err
    packed = file.with_name("text.lut")
    assert f"{packed}: {len(TEXT):,} bytes, {packed.stat().st_size:,} compressed, " in outcome.out
    assert outcome.err == ""
    assert not file.exists()
    assert packed.stat().st_mtime == 1e9
    assert luthier("verify", packed).out.startswith(f"{packed}: good, ")
    assert luthier("decompress", packed).code == 0
    assert file.read_bytes() == TEXT
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["text", "text.lut"]


def test_several_files_and_numbers(luthier: Command, file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"")
    done = json.loads(luthier("compress", file, other, "--json").out)["files"]
    assert [row["bytes"] for row in done] == [len(TEXT), 0]
    packed = [f"{file}.lut", f"{other}.lut"]
    assert [row["compressed_bytes"] for row in done] == [Path(name).stat().st_size for name in packed]
    shown = json.loads(luthier("info", *packed, "--json").out)["files"]
    assert [{**row, "file": "", "sha256_first_half": 0} for row in shown] == [
        {**row, "file": "", "sha256_first_half": 0} for row in done
    ]
    assert [row["frames_with_code"] for row in shown] == [0, 0]
    assert "1 mixed" in luthier("info", packed[0]).out


def test_pipes(file: Path) -> None:
    packed = piped("compress", "-", data=TEXT)
    assert packed.returncode == 0
    assert piped("decompress", "-", data=packed.stdout).stdout == TEXT
    assert piped("compress", "-c", file, data=b"").stdout != b""
    damaged = bytearray(packed.stdout)
    damaged[60] ^= 1
    refused = piped("decompress", "-", data=bytes(damaged))
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert re.search(rb"frame 0 at byte \d+: its checksum differs", refused.stderr)


def test_the_shipped_network_is_the_default_and_helps(luthier: Command, tmp_path: Path) -> None:
    network = shipped_network()
    assert network is not None
    assert network.stat().st_size < 8_000_000
    text = b"It was a fine evening, and the whole village had come down to the river to look at the boats."
    path = tmp_path / "evening"
    path.write_bytes(text)
    assert luthier("compress", path).code == 0
    assert luthier("compress", path, "--model", "none", "-o", tmp_path / "none.lut").code == 0
    small, plain = (file.stat().st_size for file in (tmp_path / "evening.lut", tmp_path / "none.lut"))
    assert small < plain < len(text) + 32
    told = json.loads(luthier("info", tmp_path / "evening.lut", "--json").out)
    assert load(network).sha256 in json.dumps(told)
    assert not any(part.startswith(("/", "~")) for part in json.dumps(load(network).provenance).split('"'))


def test_it_works_without_torch(luthier_without_torch: Command, file: Path) -> None:
    assert luthier_without_torch("compress", file).code == 0
    assert luthier_without_torch("decompress", f"{file}.lut", "-f").code == 0
    assert file.read_bytes() == TEXT


def test_nothing_is_overwritten_unasked(luthier: Command, file: Path) -> None:
    packed = file.with_name("text.lut")
    packed.write_bytes(b"precious")
    assert luthier("compress", file).error == f"{packed} exists"
    assert packed.read_bytes() == b"precious"
    assert luthier("compress", file, "-f").code == 0
    assert luthier("decompress", packed).error == f"{file} exists"
    assert "is compressed already" in luthier("compress", packed).error
    assert luthier("compress", packed, "-f", "-o", file.with_name("twice")).code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compress"], "no file was given"),
        (["compress", "a", "b", "-o", "c"], "-o c does not go with 2 files"),
        (["compress", "a", "-c", "-o", "c"], "-o c does not go with --stdout"),
        (["compress", "a", "-c", "--rm"], "--rm does not go with --stdout"),
        (["compress", "a", "-k", "--rm"], "--keep and --rm contradict each other"),
        (["compress", "-", "--rm"], "standard input can be read once, and not removed"),
        (["compress", "-", "--json"], "--json and the compressed bytes both go to standard output"),
        (["decompress", "a"], "a: the name does not end in .lut"),
        (["decompress", "missing.lut"], "missing.lut: no such file or directory"),
        (["info", "-"], "info needs files in which it can seek"),
    ],
)
def test_what_cannot_be_meant_is_refused(luthier: Command, arguments: list[str], told: str) -> None:
    outcome = luthier(*arguments)
    assert outcome.code == 2
    assert outcome.error == told


def test_damage_leaves_nothing_behind(luthier: Command, file: Path) -> None:
    luthier("compress", file, "--rm")
    packed = file.with_name("text.lut")
    good = packed.read_bytes()
    damaged = bytearray(good)
    damaged[60] ^= 1
    packed.write_bytes(damaged)
    other = file.with_name("other.lut")
    other.write_bytes(good)
    outcome = luthier("verify", packed, other)
    assert re.match(re.escape(str(packed)) + r": frame 0 at byte \d+: its checksum differs", outcome.error)
    assert f"{other}: good" in outcome.out
    assert luthier("decompress", packed, "--rm").code == 2
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["other.lut", "text.lut"]


def test_info_counts_the_frames_with_a_code(luthier: Command, tmp_path: Path) -> None:
    from luthier.entropy.codec import container
    from luthier.entropy.codec.frames import MIXED, RAW, Frame

    parts = [
        Frame(MIXED, 4, 2, b"abc", 7),
        Frame(RAW, 1, 0, b"d"),
        Frame(MIXED, 4, 1, b"ef"),
        Frame(MIXED, 9, 1, b"gh", 1),
    ]
    header = container._pack_header(container.Header(slots=12, model="ab" * 32))
    frames = b"".join(container._pack_frame(frame, b"") for frame in parts)
    file = tmp_path / "some.lut"
    file.write_bytes(header + frames + container._pack_index([container._row(frame) for frame in parts], bytes(16)))
    shown = luthier("info", file)
    assert shown.code == 0, shown.err
    assert "2 mixed with a code, 1 raw, 1 mixed" in " ".join(shown.out.split())
    assert json.loads(luthier("info", file, "--json").out)["files"][0]["frames_with_code"] == 2


def test_a_network_that_is_not_there_is_named(luthier: Command, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat:
        sha256 = "cd" * 32
        dims = levels = 0

        def open(self, streams: int, code: tuple[int, ...] = (), /) -> int:
            return streams

        def probabilities(self, state: int, /) -> Any:
            import numpy as np

            return np.ones((state, 256), np.uint32)

        def advance(self, state: int, data: object, /) -> None:
            pass

    monkeypatch.setattr(compress_verb, "open_network", lambda name: Flat())
    assert luthier("compress", file).code == 0
    error = luthier("decompress", f"{file}.lut", "-f").error
    assert error == f"the file needs the network with SHA-256 {'cd' * 32}, which is not here"
    assert file.read_bytes() == TEXT


def test_interrupting_removes_the_partial_output(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 16) * 96)
    process = subprocess.Popen([sys.executable, "-m", "luthier", "compress", str(big)], stderr=subprocess.PIPE)
    limit = time.monotonic() + 60
    while not list(tmp_path.glob(".big.lut*")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in told
    assert list(tmp_path.iterdir()) == [big]
