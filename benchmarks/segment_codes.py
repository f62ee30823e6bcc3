"""What codes of a frame save: pieces of texts, each compressed cold with the network alone told and not told a code.

    python benchmarks/segment_codes.py NETWORK --text FILE ... [--sizes 4096 65536] [--pieces 3]

NETWORK comes from `luthier train-codec --code-dims M`. Of every text and size, `pieces` evenly spread pieces. Bytes are
those of payload and code. `found` says for how many of them the search proposes a code, `kept` where the frame with it
is shorter; `saved` is over all pieces, those without a code included. Times are of the processor.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path
from typing import Any, NamedTuple

from record import record

from luthier.entropy.codec.frames import FrameCoder, slot_bits
from luthier.entropy.codec.integer_network import IntegerNetwork
from luthier.entropy.codec.segment_code import Code, find_code


class Piece(NamedTuple):
    """One piece: bytes without and with the code that the search found, and seconds of search and of one encoding."""

    code: Code
    without: int
    told: int
    search: float
    encode: float


def measure(network: IntegerNetwork, data: bytes) -> Piece:
    """Encode a piece as its file's only frame."""
    began = time.process_time()
    code = find_code(network, data)
    found = time.process_time()
    without = cost(network, data, ())
    encode = time.process_time() - found
    return Piece(code, without, cost(network, data, code) if code else without, found - began, encode)


def cost(network: IntegerNetwork, data: bytes, code: Code) -> int:
    """Bytes of the frame under a code; those of the data when it is not shorter."""
    frame = FrameCoder(slot_bits(len(data)), network)._mixed(data, code, lambda size: None)
    return len(data) if frame is None else min(frame.cost, len(data))


def pieces_of(text: bytes, size: int, count: int) -> list[bytes]:
    """`count` pieces of `size` bytes around the inner division points of a text."""
    middles = [len(text) * (i + 1) // (count + 1) for i in range(count)]
    return [text[max(0, middle - size // 2) :][:size] for middle in middles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files, also .gz")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 65536])
    parser.add_argument("--pieces", type=int, default=3)
    options: Any = parser.parse_args()
    network = IntegerNetwork.load(options.network)
    for size in options.sizes:
        for file in options.text:
            text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            found = [measure(network, piece) for piece in pieces_of(text, size, options.pieces)]
            record(
                "segment_codes",
                file=file.name,
                size=size,
                pieces=len(found),
                found=sum(bool(one.code) for one in found),
                kept=sum(one.told < one.without for one in found),
                bytes_without=sum(one.without for one in found),
                saved=sum(max(0, one.without - one.told) for one in found),
                lost_if_always_sent=sum(max(0, one.told - one.without) for one in found),
                codes=[one.code for one in found],
                search_seconds=round(sum(one.search for one in found) / len(found), 3),
                encode_seconds=round(sum(one.encode for one in found) / len(found), 3),
                network=network.sha256,
            )


if __name__ == "__main__":
    main()
