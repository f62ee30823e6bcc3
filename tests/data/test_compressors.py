from __future__ import annotations

import random
import shutil
import subprocess

import pytest

from luthier.core.errors import ConfigError, MissingExtra
from luthier.data.compressors import COMPRESSORS, PREDICTORS, compressed_bytes, missing
from luthier.data.python_prose import python_prose

COMMANDS = {
    "gzip": ["gzip", "-9"],
    "bzip2": ["bzip2", "-9"],
    "xz": ["xz", "-9e"],
    "zstd": ["zstd", "-19", "--long", "--single-thread", "-q"],
}
TEXT = "".join(python_prose()[:20]).encode()
SHORT = TEXT[:60_000]  # for those that take their time


@pytest.mark.parametrize("name", COMPRESSORS)
def test_sizes_are_those_of_the_command_line_tools(name: str) -> None:
    command = COMMANDS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    theirs = len(subprocess.run([*command, "-c"], input=TEXT, capture_output=True, check=True).stdout)
    # The formats of xz and bzip2 have one encoder each; releases of zlib and zstd differ a little.
    tolerance = 64 if name in ("xz", "bzip2") else 64 + 0.005 * theirs
    assert abs(compressed_bytes(name, TEXT) - theirs) <= tolerance


@pytest.mark.parametrize("name", ["xz", "zstd"])
def test_a_known_text_costs_almost_nothing(name: str) -> None:
    assert compressed_bytes(name, TEXT[:50_000], given=TEXT) < 200


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_related_text_helps_those_who_can_look_back(name: str) -> None:
    head, tail = TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]
    cold, conditional = compressed_bytes(name, tail), compressed_bytes(name, tail, given=head)
    assert conditional < cold * (0.97 if name in ("xz", "zstd") else 1.01)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'zstd'"):
        compressed_bytes("zst", b"text")


def needs(name: str) -> None:
    if reason := missing(name):
        pytest.skip(reason)


@pytest.mark.parametrize("name", PREDICTORS)
def test_those_that_predict_beat_those_that_look_back(name: str) -> None:
    needs(name)
    assert compressed_bytes(name, SHORT) < 0.97 * min(
        compressed_bytes(other, SHORT) for other in ("xz", "zstd", "bzip2")
    )


@pytest.mark.parametrize("name", PREDICTORS)
def test_those_that_predict_learn_from_a_related_text(name: str) -> None:
    needs(name)
    head, tail = SHORT[: len(SHORT) // 2], SHORT[len(SHORT) // 2 :]
    assert compressed_bytes(name, tail, given=head) < 0.97 * compressed_bytes(name, tail)


def test_ppmd_counts_the_bytes_of_a_stream_that_can_be_read() -> None:
    needs("ppmd")
    import pyppmd

    stream = pyppmd.compress(TEXT, max_order=6, mem_size=256 << 20, variant="I")
    assert pyppmd.decompress(stream, max_order=6, mem_size=256 << 20, variant="I") == TEXT
    assert compressed_bytes("ppmd", TEXT) == len(stream)


def test_random_bytes_are_incompressible_for_all_who_are_here() -> None:
    noise = random.Random(0).randbytes(20_000)
    for name in (*COMPRESSORS, *PREDICTORS):
        if not missing(name):
            assert compressed_bytes(name, noise) > 0.999 * len(noise)


def test_zpaq_without_its_program_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "apt-get install zpaq" in missing("zpaq")
    with pytest.raises(MissingExtra, match="the program 'zpaq' is not installed"):
        compressed_bytes("zpaq", TEXT)
