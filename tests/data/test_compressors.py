from __future__ import annotations

import shutil
import subprocess

import pytest

from luthier.core.errors import ConfigError
from luthier.data.compressors import COMPRESSORS, compressed_bytes
from luthier.data.python_prose import python_prose

COMMANDS = {
    "gzip": ["gzip", "-9"],
    "bzip2": ["bzip2", "-9"],
    "xz": ["xz", "-9e"],
    "zstd": ["zstd", "-19", "--long", "--single-thread", "-q"],
}
TEXT = "".join(python_prose()[:20]).encode()


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
