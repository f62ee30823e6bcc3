"""The byte-level network of the compressor: probabilities of the next byte that are the same on every machine.

Weights and activations are 8-bit integers, sums are exact, and softmax and normalization are integer functions, so the
probabilities are a function of the bytes read and of nothing else: not of the processor, the number of threads, or how
many streams advance together. `integer_reference` defines them; C (`integer_network.c`) computes the same bits faster,
and where no C compiler is found the reference itself is used.

    network = IntegerNetwork.load(Path("network.npz"))
    state = network.open(streams=16)
    counts = network.probabilities(state)  # (16, 256) uint32, each at least 1
    network.advance(state, np.frombuffer(b"sixteen letters!", np.uint8))
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import ConfigError, DataError
from luthier.core.native import FLAGS, Library, load_library
from luthier.entropy.codec.integer_features import LETTERS, NAMES, NEWLINE, ORDERS, History
from luthier.entropy.codec.integer_reference import ReferenceState, reference_open, reference_step, start_of
from luthier.entropy.codec.integer_weights import GAINS, SYMBOLS, IntegerWeights, load
from luthier.entropy.codec.segment_code import Code

SOURCE = Path(__file__).with_name("integer_network.c")
OWN_FLAGS = ("-pthread", "-fno-math-errno")  # the latter makes a square root an instruction, without a library
PORTABLE = "-DLUTHIER_PORTABLE"
MAX_THREADS = 64
BLOCK = 16  # outputs of a matrix that are computed together

How = Literal["auto", "native", "portable", "reference"]


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "offsets", "scales")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("distances", "scores")),
        *((name, ctypes.c_int64) for name in GAINS),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
        ("tables", ctypes.c_void_p * len(NAMES)),
        *((name, ctypes.c_int64 * len(NAMES)) for name in ("table_scales", "table_bits", "orders")),
        ("letters", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("num_layers", "width", "heads", "head_width", "hidden", "window", "head_gain")
        ),
    )


_STATE_ARRAYS = (
    "recent",
    "word",
    "before",
    "keys",
    "values",
    "residual",
    "sums",
    "inputs",
    "weights",
    "probabilities",
)


class _State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _STATE_ARRAYS),
        *((name, ctypes.c_int64) for name in ("streams", "widest", "position")),
    )


@dataclass
class NativeState:
    """B streams as the C code sees them; `arrays` owns the memory that `handle` points to."""

    owner: _Native
    handle: _State
    arrays: dict[str, NDArray[Any]]
    start: NDArray[np.int32] | None
    """(D): what the residual stream begins with under a segment code."""


State = NativeState | ReferenceState


class IntegerNetwork:
    """A loaded network. States are independent; one network serves one caller at a time."""

    def __init__(self, weights: IntegerWeights, *, threads: int = 1, how: How = "auto") -> None:
        """`threads`: among which the streams of a state are split; results do not depend on it.

        `how`: "native" is C for this processor, "portable" C without its vector instructions, "reference" numpy; all
        give the same bits. "auto" is native where a compiler is found, and else the reference; `means` says which.
        ConfigError when threads are out of range or when C was asked for and cannot be had.
        """
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(
                f"threads: got {threads}, expected 1 to {MAX_THREADS}", hint="use as many as there are cores"
            )
        self.weights = weights
        self.sha256 = weights.sha256
        self.means = "numpy, as asked for"
        self._native: _Native | None = None
        if how == "reference":
            return
        library, self.means = compiled(portable=how == "portable")
        if library is not None:
            self._native = _Native(library, weights, threads)
        elif how == "auto":
            self.means = f"numpy, some forty times slower: {self.means}"
        else:
            raise ConfigError(f"how: {how} cannot be had, {self.means}", hint="install a C compiler, or use reference")

    @staticmethod
    def load(file: Path, *, threads: int = 1, how: How = "auto") -> IntegerNetwork:
        """Read a file that `integer_weights.save` wrote; CheckpointError when it is damaged."""
        return IntegerNetwork(load(file), threads=threads, how=how)

    @property
    def context(self) -> int:
        """Bytes that one layer attends to; L layers together see about L times as many."""
        return self.weights.shape.window

    @property
    def dims(self) -> int:
        """Dimensions of the segment codes that it was trained with; 0 when there are none."""
        return self.weights.shape.code_dims

    @property
    def levels(self) -> int:
        """Levels of each dimension."""
        return self.weights.shape.code_levels

    def open(self, streams: int, code: Code = ()) -> State:
        """A state of `streams` streams before their first byte; it holds a little over 2 W S bytes per layer each.

        `code`: levels of the first dimensions of the segment code, for all of the streams.
        """
        if streams < 1:
            raise ConfigError(f"streams: got {streams}, expected at least 1", hint="open(streams=1)")
        if len(code) > self.dims or not all(0 <= level < self.levels for level in code):
            raise DataError(
                f"code: got {code}, expected at most {self.dims} levels below {self.levels}", hint="open(streams)"
            )
        opened = reference_open if self._native is None else self._native.open
        empty = opened(self.weights, streams, code)
        self.advance(empty, np.full(streams, NEWLINE, np.uint8))
        return empty

    def probabilities(self, state: State) -> NDArray[np.uint32]:
        """Of the next byte of each stream: (B, 256), each at least 1, of any total below 2^32; until `advance`."""
        return state.arrays["probabilities"] if isinstance(state, NativeState) else state.probabilities

    def advance(self, state: State, last: NDArray[np.uint8]) -> None:
        """Read the bytes (B) that came, and predict the next ones."""
        streams = len(self.probabilities(state))
        if last.shape != (streams,) or last.dtype != np.uint8:
            raise DataError(
                f"advance: got {last.dtype} {last.shape}, expected uint8 ({streams},)", hint="give one byte per stream"
            )
        if isinstance(state, NativeState):
            if state.owner is not self._native:
                raise DataError("advance: got a state that another network opened", hint="open one of this network")
            state.owner.step(state, np.ascontiguousarray(last))
        else:
            vars(state).update(vars(reference_step(self.weights, state, last)))


class _Native:
    """The network in the layout of the C code, and its threads."""

    def __init__(self, library: ctypes.CDLL, weights: IntegerWeights, threads: int) -> None:
        self._kept = list[NDArray[Any]]()  # the memory that the structures point to
        self._threads, self._library = threads, library
        self._layers = (_Layer * weights.shape.layers)(*(self._layer(weights, i) for i in range(weights.shape.layers)))
        self._network = self._describe(weights)
        self._pool = library.pool_open(threads)
        if not self._pool:
            raise ConfigError(f"threads: {threads} could not be started", hint="use fewer threads")
        self._end = weakref.finalize(self, library.pool_close, self._pool)

    def open(self, weights: IntegerWeights, streams: int, code: Code) -> NativeState:
        shape, start = weights.shape, History.start(streams)
        inner = shape.heads * shape.head_width
        widest = max(shape.width, inner + 2 * shape.head_width, shape.hidden, SYMBOLS)
        ring = (shape.layers, streams, shape.window, shape.head_width)
        arrays: dict[str, NDArray[Any]] = {
            "recent": start.recent,
            "word": start.word,
            "before": start.before,
            "keys": np.zeros(ring, np.uint8),
            "values": np.zeros(ring, np.int8),
            "residual": np.zeros((streams, shape.width), np.int32),
            "sums": np.zeros((streams, widest), np.int32),
            "inputs": np.zeros((streams, widest), np.uint8),
            "weights": np.zeros((self._threads, shape.window), np.int32),
            "probabilities": np.zeros((streams, SYMBOLS), np.uint32),
        }
        pointers = [arrays[name].ctypes.data for name in _STATE_ARRAYS]
        begin = start_of(weights, code).astype(np.int32) if code else None
        return NativeState(self, _State(*pointers, streams, widest, 0), arrays, begin)

    def step(self, state: NativeState, last: NDArray[np.uint8]) -> None:
        what = self._pool, ctypes.byref(self._network), ctypes.byref(state.handle), last.ctypes.data
        if state.start is None:
            self._library.pool_step(*what)
        else:
            self._library.pool_step_from(*what, state.start.ctypes.data)

    def _describe(self, weights: IntegerWeights) -> _Network:
        shape, arrays = weights.shape, weights.arrays
        tables = [self._keep(arrays[f"table.{name}"]) for name in NAMES]
        network = _Network(layers=self._layers, head=self._matrix(weights, "head", offset=128))
        network.tables = (ctypes.c_void_p * len(NAMES))(*tables)
        network.table_scales = (ctypes.c_int64 * len(NAMES))(*arrays["table.scales"].tolist())
        network.table_bits = (ctypes.c_int64 * len(NAMES))(8, *shape.table_bits)
        network.orders = (ctypes.c_int64 * len(NAMES))(1, *ORDERS, 4, 4)
        network.letters = self._keep(LETTERS)
        network.num_layers, network.head_gain = shape.layers, int(arrays["head.gain"][0])
        for name in ("width", "heads", "head_width", "hidden", "window"):
            setattr(network, name, getattr(shape, name))
        return network

    def _layer(self, weights: IntegerWeights, layer: int) -> _Layer:
        names = {"qkv": 128, "out": 128, "up": 128, "down": 0}  # squares are not negative and need no offset
        matrices = [self._matrix(weights, f"{layer}.{name}", offset=offset) for name, offset in names.items()]
        by_age = weights.arrays[f"{layer}.distance"]
        window = by_age.shape[1]
        # At W - (place of this byte) + (place of that byte): minus the age, modulo W.
        twice_round = by_age[:, -np.arange(2 * window) % window]
        rest = [self._keep(twice_round), self._keep(weights.arrays[f"{layer}.scores"])]
        return _Layer(*matrices, *rest, *weights.arrays[f"{layer}.gains"].tolist())

    def _matrix(self, weights: IntegerWeights, name: str, *, offset: int) -> _Matrix:
        matrix = weights.arrays[name]
        outputs, inputs = matrix.shape
        packed = matrix.reshape(outputs // BLOCK, BLOCK, inputs // 4, 4).transpose(0, 2, 1, 3)
        offsets = offset * matrix.sum(1, dtype=np.int64)
        kept = self._keep(packed), self._keep(offsets.astype(np.int32)), self._keep(weights.arrays[f"{name}.scale"])
        return _Matrix(*kept, inputs, outputs)

    def _keep(self, array: NDArray[Any]) -> int:
        self._kept.append(np.ascontiguousarray(array))
        return int(self._kept[-1].ctypes.data)


@functools.cache
def compiled(*, portable: bool) -> Library:
    """The C code, with vector instructions where this processor has them unless `portable`; or None, and why not."""
    code, reason = load_library(SOURCE, (*FLAGS, *OWN_FLAGS, *((PORTABLE,) if portable else ())))
    if code is not None:
        code.pool_open.argtypes, code.pool_open.restype = [ctypes.c_int64], ctypes.c_void_p
        code.pool_close.argtypes, code.pool_close.restype = [ctypes.c_void_p], None
        code.pool_step.argtypes, code.pool_step.restype = [ctypes.c_void_p] * 4, None
        code.pool_step_from.argtypes, code.pool_step_from.restype = [ctypes.c_void_p] * 5, None
    return Library(code, reason)
