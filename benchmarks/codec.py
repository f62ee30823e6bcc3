"""Bits per byte and speed of the compressor beside others, on files of your choice; or a search for its faults.

    python benchmarks/codec.py FILE… [--model none|auto|NETWORK] [--skip zpaq …]
    python benchmarks/codec.py --fuzz 10000 [--model none|auto|NETWORK]

Every size is that of a whole file, headers and checksums included. Speeds are per second of processor time, all
threads added, which a busy machine disturbs least. Ours is timed in this process without its check; a second row has
the time with it, without a network. The others run in this process (gzip, bzip2, xz, zstd, PPMd: the best of orders 5,
6 and 8, timed at order 6) or as a program (zpaq -m5 on one thread, its start included). PPMd needs `pip install
pyppmd`; what is not installed is left out, and said.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import importlib
import importlib.util
import io
import lzma
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from record import record

from luthier.cli.archives import open_network
from luthier.core.errors import DataError
from luthier.entropy.codec.container import compress, decompress
from luthier.entropy.codec.frames import Network

PPMD_ORDERS = (6, 5, 8)  # the first is timed
PPMD_MEMORY = 256 << 20


class Measured(NamedTuple):
    """Bytes of the compressed file, and seconds of processor time each way."""

    size: int
    there: float
    back: float


def in_process(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes], data: bytes) -> Measured:
    """Time both ways, and check that the bytes come back."""
    began = time.process_time()
    packed = pack(data)
    half = time.process_time()
    assert unpack(packed) == data
    return Measured(len(packed), half - began, time.process_time() - half)


def ours(data: bytes, network: Network | None, *, verify: bool) -> Measured:
    """The compressor of this package."""

    def pack(text: bytes) -> bytes:
        target = io.BytesIO()
        compress(io.BytesIO(text), target, size=len(text), network=network, verify=verify)
        return target.getvalue()

    def unpack(packed: bytes) -> bytes:
        target = io.BytesIO()
        decompress(io.BytesIO(packed), target, find_network=lambda sha256: required(network))
        return target.getvalue()

    return in_process(pack, unpack, data)


def required(network: Network | None) -> Network:
    assert network is not None
    return network


def zstd(data: bytes) -> Measured:
    import zstandard

    packer = zstandard.ZstdCompressor(level=22)
    return in_process(packer.compress, zstandard.ZstdDecompressor().decompress, data)


def ppmd(data: bytes) -> Measured:
    """Packing only: the decoder of pyppmd 1.3 calls some of what it packed corrupt. A speed of 0 was not measured."""
    pyppmd: Any = importlib.import_module("pyppmd")
    found: list[tuple[int, float]] = []
    for order in PPMD_ORDERS:
        began = time.process_time()
        packed = pyppmd.compress(data, max_order=order, mem_size=PPMD_MEMORY)
        found.append((len(packed), time.process_time() - began))
    return Measured(min(size for size, _ in found), found[0][1], math.inf)


def zpaq(data: bytes) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(data)
        began = children_time()
        command = ["zpaq", "a", "a.zpaq", "file", "-m5", "-t1"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        half = children_time()
        subprocess.run(["zpaq", "x", "a.zpaq", "-to", "out", "-t1"], cwd=folder, check=True, capture_output=True)
        return Measured((Path(folder) / "a.zpaq").stat().st_size, half - began, children_time() - half)


def children_time() -> float:
    """Seconds of processor time of the programs that were started and have ended."""
    times = os.times()
    return times.children_user + times.children_system


OTHERS: dict[str, Callable[[bytes], Measured]] = {
    "gzip -9": lambda data: in_process(lambda text: gzip.compress(text, 9, mtime=0), gzip.decompress, data),
    "bzip2 -9": lambda data: in_process(bz2.compress, bz2.decompress, data),
    "xz -9e": lambda data: in_process(
        lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), lzma.decompress, data
    ),
    "zstd -22": zstd,
    "PPMd": ppmd,
    "zpaq -m5": zpaq,
}
NEEDS = {"zstd -22": "zstandard", "PPMd": "pyppmd"}


def present(name: str) -> bool:
    """Whether a compressor is installed."""
    if name == "zpaq -m5":
        return shutil.which("zpaq") is not None
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


def measure(file: Path, networks: dict[str, Network | None], skip: list[str]) -> None:
    """One row of results for a file."""
    data = file.read_bytes()
    found = {name: ours(data, network, verify=False) for name, network in networks.items()}
    found["luthier, no network, verified"] = ours(data, None, verify=True)
    for name, run in OTHERS.items():
        if any(word in name for word in skip):
            continue
        if present(name):
            found[name] = run(data)
        else:
            print(f"{name} is not installed")
    record(
        "codec",
        file=file.name,
        bytes=len(data),
        bits_per_byte={name: round(8 * one.size / len(data), 4) for name, one in found.items()},
        kilobytes_per_processor_second={
            name: [round(len(data) / 1000 / max(seconds, 1e-6), 1) for seconds in (one.there, one.back)]
            for name, one in found.items()
        },
        models={name: network.sha256 for name, network in networks.items() if network is not None},
    )


def drawn_input(draw: random.Random) -> bytes:
    """Noise, few symbols, zeros, repeats of itself, words, cut UTF-8, a compressed file, or words within noise."""
    size = draw.choice((0, 1, 2, 3, draw.randrange(64), draw.randrange(600), draw.randrange(4000)))
    noise = draw.randbytes(size)
    few = bytes(draw.choices(noise[: draw.randint(1, 4)] or b"x", k=size))
    words = " ".join(draw.choices(("violin", "viola", "Bogen", "é", "漢字", "\n", "12"), k=size // 5)).encode()
    return draw.choice(
        (
            noise,
            few,
            bytes(size),
            (noise[: draw.randint(1, 40)] * size)[:size],
            words,
            words[draw.randrange(4) :][: draw.randrange(size + 1)],
            bz2.compress(words),
            noise[: size // 2] + words + noise[: size // 2],
        )
    )


def fuzz(count: int, seed: int, network: Network | None) -> None:
    """Round trips of `count` inputs, and of each a damaged copy that must be refused."""
    began, total, longest = time.perf_counter(), 0, 0

    def find(sha256: str) -> Network:
        if network is None or network.sha256 != sha256:
            raise DataError(f"no network {sha256}", hint="the digest is damaged")
        return network

    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        data, target = drawn_input(draw), io.BytesIO()
        known = number % 50 != 0  # without a size, a coder takes 64 MiB
        size = len(data) if known else None
        compress(io.BytesIO(data), target, size=size, network=network, verify=number % 10 == 0)
        packed, back = target.getvalue(), io.BytesIO()
        decompress(io.BytesIO(packed), back, find_network=find)
        assert back.getvalue() == data, f"input {number} of seed {seed} does not come back"
        damaged = bytearray(packed)
        damaged[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
        try:
            decompress(io.BytesIO(bytes(damaged)), None, find_network=find)
        except DataError:
            pass
        else:
            raise AssertionError(f"a damaged copy of input {number} of seed {seed} was taken for good")
        total += len(data)
        longest = max(longest, len(packed) - len(data))
    seconds = round(time.perf_counter() - began, 1)
    model = network.sha256 if network else "none"
    record("codec_fuzz", inputs=count, seed=seed, model=model, bytes=total, most_bytes_added=longest, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default="auto", help="none, auto or a network file")
    parser.add_argument("--skip", nargs="*", default=[], help="compressors to leave out")
    parser.add_argument("--fuzz", type=int, default=0, help="this many round trips instead")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    network = open_network(options.model)
    if options.fuzz:
        fuzz(options.fuzz, options.seed, network)
        return
    networks: dict[str, Network | None] = {"luthier, no network": None}
    if network is not None:
        networks["luthier"] = network
    for file in options.files:
        measure(file, networks, options.skip)


if __name__ == "__main__":
    main()
