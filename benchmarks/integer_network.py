"""The compressor's byte-level network: time per byte on one and two threads, and bits per byte of texts.

Without a file, a network of the default shape with random weights: speed needs no others. `cpu` is processor time of
all threads, the least over rounds, which a busy machine disturbs least; `wall` is what a codec waits for. Texts are cut
into as many streams as there are, each of which starts with nothing read.

    python benchmarks/integer_network.py [NETWORK] [--text FILE ...] [--streams 16] [--rounds 20] [--most BYTES]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from luthier.core.stats import bootstrap_median
from luthier.entropy.codec.integer_network import IntegerNetwork
from luthier.entropy.codec.integer_weights import IntegerWeights, Shape, expected_arrays, load

WIDTH, LAYERS, HEADS, HEAD_WIDTH, HIDDEN, WINDOW = 128, 4, 4, 32, 512, 128
STEPS = 20  # bytes of each stream in a round


def random_weights() -> IntegerWeights:
    """A network that predicts nothing, as fast as any of its shape."""
    shape = Shape(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        head_width=HEAD_WIDTH,
        hidden=HIDDEN,
        window=WINDOW,
        table_bits=(12, 13, 13, 13, 13),
    )
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        name: rng.integers(1 << 24, 1 << 26, size).astype(kind)
        if name.endswith((".scale", ".scores", ".gains", ".gain"))
        else rng.integers(-63, 64, size).astype(kind)
        for name, (size, kind) in expected_arrays(shape).items()
    }
    arrays["table.scales"] = np.full_like(arrays["table.scales"], 1000)
    return IntegerWeights(shape=shape, arrays=arrays, provenance={})


def products(shape: Shape) -> int:
    """Multiplications of weights for one byte."""
    inner = shape.heads * shape.head_width
    attention = shape.width * (2 * inner + 2 * shape.head_width)
    return shape.layers * (attention + 2 * shape.width * shape.hidden) + 256 * shape.width


def measure_speed(weights: IntegerWeights, streams: int, threads: int, rounds: int, how: str) -> dict[str, object]:
    """Microseconds of a byte, by the clock and of the processors."""
    network = IntegerNetwork(weights, threads=threads, how=how)  # type: ignore[arg-type]
    state, wall, cpu = network.open(streams), [], []
    last = np.full(streams, ord("e"), np.uint8)
    for _ in range(WINDOW // STEPS + 1 + rounds):  # the first rounds fill the window
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            network.advance(state, last)
        wall.append((time.perf_counter() - began) / STEPS / streams * 1e6)
        cpu.append((time.process_time() - busy) / STEPS / streams * 1e6)
    wall, cpu = wall[-rounds:], cpu[-rounds:]
    return {
        "wall": bootstrap_median(wall).text(1),
        "wall_least": round(min(wall), 2),
        "cpu_least": round(min(cpu), 2),
        "gmac_per_cpu_second": round(products(weights.shape) / min(cpu) / 1e3, 1),
    }


def bits_per_byte(network: IntegerNetwork, text: NDArray[np.uint8], streams: int) -> float:
    """Ideal code length of a text of which the streams are consecutive pieces; a remainder is left out."""
    rows = text[: len(text) // streams * streams].reshape(streams, -1)
    state, bits = network.open(streams), 0.0
    for column in rows.T:
        counts = network.probabilities(state)
        bits -= float(np.log2(counts[np.arange(streams), column] / counts.sum(1, dtype=np.float64)).sum())
        network.advance(state, np.ascontiguousarray(column))
    return bits / rows.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", type=Path)
    parser.add_argument("--text", nargs="*", type=Path, default=[])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--most", type=int, default=1 << 20, help="bytes of each text that are read")
    options = parser.parse_args()
    weights = load(options.network) if options.network else random_weights()
    speeds = {
        f"{how}, {threads} threads": measure_speed(weights, options.streams, threads, options.rounds, how)
        for how, threads in (("native", 1), ("native", 2), ("portable", 1), ("reference", 1))
    }
    network = IntegerNetwork(weights, threads=2)
    texts = {
        file.name: round(bits_per_byte(network, np.fromfile(file, np.uint8)[: options.most], options.streams), 4)
        for file in options.text
    }
    record(
        "integer_network",
        network=network.sha256 if options.network else "random",
        shape=vars(weights.shape),
        products=products(weights.shape),
        streams=options.streams,
        rounds=options.rounds,
        microseconds_per_byte=speeds,
        bits_per_byte=texts,
        most_bytes=options.most,
    )


if __name__ == "__main__":
    main()
