"""The `.lut` file: a header, frames, an index. Integers are little-endian; varint is 7 bits a byte, lowest first.

| header | bytes | |
|---|---|---|
| magic | 4 | 89 4C 55 54 (`.LUT`) |
| version | 1 | 1 |
| flags | 1 | 1: the length is known; 2: a network takes part |
| slot bits | 1 | logarithm of the number of context slots, 12 to 24: 16 · 2^bits bytes of memory |
| numeric mode | 1 | 1: integers only, so that every machine decodes it |
| P | 1 | 16: bits of a probability |
| tokenizer | 1 | 0: bytes |
| length | varint | of the original in bytes; only with flag 1 |
| model | 32 | SHA-256 of the network; only with flag 2 |
| check | 4 | CRC-32 of the header so far |

| frame | bytes | |
|---|---|---|
| kind | 1 | 0 raw; 32 + streams (1 to 32) − 1 mixed; 64 + streams − 1 mixed, the network given a code of the frame |
| size | varint | bytes of text, 1 to 2^26 |
| length | varint | bytes of payload; not of a raw frame, and less than the size |
| code | varint | number of the code, at least 1 (`segment_code.py`); only of kinds 64 to 95 |
| payload | | the range coder's bytes, or the text itself |
| check | 4 | CRC-32 of all of the above, continued over the text |

| index | bytes | |
|---|---|---|
| kind | 1 | 255 |
| frames | varint | their number, then of each: kind (1), size (varint), length of the payload (varint) |
| digest | 16 | the first half of the SHA-256 of the original |
| check | 4 | CRC-32 of the index so far |
| length | 4 | of the index with the check, so that it is found from the end |

Nothing follows. Frames build on those before them (see `frames.py`), and so are decoded in order. A file is longer than
its original by at most 90 bytes, and 20 for each frame of 4 MiB.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from luthier.core.errors import DataError
from luthier.entropy.codec.frames import FRAME_BYTES, MIXED, RAW, Frame, FrameCoder, Network, Progress, slot_bits
from luthier.entropy.codec.segment_code import most_codes

MAGIC, VERSION = b"\x89LUT", 1
LENGTH_KNOWN, WITH_NETWORK = 1, 2
INTEGERS, PROBABILITY_BITS, BYTES = 1, 16, 0
MIXED_KIND, CODED_KIND, END_KIND = 32, 64, 255
KINDS = {RAW: "raw", MIXED_KIND: "mixed", CODED_KIND: "mixed with a code"}  # by the first of 32
MOST_FRAME = 1 << 26
MOST_SLOT_BITS = 24
Row = tuple[int, int, int]  # of the index: kind, size, length of the payload
DAMAGED = "the file is damaged: take another copy"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a decoder must know first: `length` None where it was not known, `model` 64 hexadecimal digits or ''."""

    slots: int
    length: int | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A file in numbers, all in bytes."""

    size: int
    compressed: int
    frames: tuple[tuple[str, int, int], ...]  # kind, size, length of the payload
    digest: str
    header: Header

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole file per byte of the original; 0 for an empty original."""
        return 8 * self.compressed / self.size if self.size else 0.0

    @property
    def coded(self) -> int:
        """Frames that took a segment code."""
        return sum(kind == KINDS[CODED_KIND] for kind, _, _ in self.frames)


class _Reader:
    """Counts bytes, and says where a file ends too early."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset, self.where = file, 0, "header"
        self.taken = b""  # since `mark`

    def mark(self, where: str) -> None:
        """Begin a part of the file."""
        self.where, self.taken = f"{where} at byte {self.offset}", b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.offset += len(data)
        self.taken += data
        if len(data) < size:
            raise DataError(f"{self.where}: the file ends at byte {self.offset}, inside it", hint=DAMAGED)
        return data

    def byte(self) -> int:
        return self.read(1)[0]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise self.fault("a number is too long")

    def fault(self, what: str) -> DataError:
        return DataError(f"{self.where}: {what}", hint=DAMAGED)

    def check(self) -> None:
        """Compare the CRC-32 of the part so far."""
        found = zlib.crc32(self.taken)
        if int.from_bytes(self.read(4), "little") != found:
            raise self.fault("its checksum differs")


def compress(
    source: BinaryIO,
    target: BinaryIO,
    *,
    size: int | None,
    network: Network | None = None,
    verify: bool = True,
    progress: Progress = lambda size: None,
    native: bool | None = None,
) -> Summary:
    """Read `source` to its end and write a `.lut` file; `size` is its length in bytes where that is known.

    `verify` decodes every frame before it is written, and stores one raw that would not come back.
    Raises: DataError when the source has another length than `size`.
    """
    header = Header(slots=slot_bits(size), length=size, model=network.sha256 if network else "")
    coder = FrameCoder(header.slots, network, native=native)
    checker = FrameCoder(header.slots, network, native=native) if verify else None
    written = target.write(_pack_header(header))
    digest, rows, total = hashlib.sha256(), list[Row](), 0
    while data := _read_fully(source, FRAME_BYTES):
        frame = coder.encode(data, progress)
        if checker is not None and checker.decode(frame) != data:
            frame = coder.store(data)
            checker.store(data)
        written += target.write(_pack_frame(frame, data))
        digest.update(data)
        total += len(data)
        rows.append(_row(frame))
    if size is not None and total != size:
        raise DataError(f"the input has {total:,} bytes, expected {size:,}", hint="it changed while it was read")
    written += target.write(_pack_index(rows, digest.digest()[:16]))
    return _summary(header, rows, digest.hexdigest()[:32], written)


def decompress(
    source: BinaryIO,
    target: BinaryIO | None,
    *,
    find_network: Callable[[str], Network],
    progress: Progress = lambda size: None,
    native: bool | None = None,
) -> Summary:
    """Write the original to `target`, or only check it when that is None.

    `find_network` gives the network of a SHA-256, or raises.
    Raises: DataError with the place for whatever is wrong with the file. What was written before is good.
    """
    reader = _Reader(source)
    header = _read_header(reader)
    network = find_network(header.model) if header.model else None
    coder = FrameCoder(header.slots, network, native=native)
    digest, rows, total = hashlib.sha256(), list[Row](), 0
    for frame in _read_frames(reader, most_codes(network.dims, network.levels) if network else 0):
        before = zlib.crc32(reader.taken)
        data = coder.decode(frame, progress)
        if int.from_bytes(reader.read(4), "little") != zlib.crc32(data, before):
            raise reader.fault("its checksum differs")
        digest.update(data)
        total += len(data)
        rows.append(_row(frame))
        if target is not None:
            target.write(data)
    found, expected = _read_index(reader)
    if found != rows or expected != digest.digest()[:16] or header.length not in (None, total):
        raise reader.fault("it does not fit the frames")
    if source.read(1):
        raise DataError(f"bytes follow the end of the file, at byte {reader.offset}", hint=DAMAGED)
    return _summary(header, rows, expected.hex(), reader.offset)


def read_summary(source: BinaryIO) -> Summary:
    """The header and the index of a file that can be sought in; frames are not read. Raises DataError."""
    source.seek(0)
    reader = _Reader(source)
    header = _read_header(reader)
    end = source.seek(0, 2)
    if end < reader.offset + 26:
        raise DataError(f"the file ends at byte {end}, before its index", hint=DAMAGED)
    source.seek(end - 4)
    length = int.from_bytes(source.read(4), "little")
    if not 22 <= length <= end - 4 - reader.offset:
        raise DataError(f"no index at the end of the file, byte {end}", hint=DAMAGED)
    reader.offset = source.seek(end - 4 - length)
    reader.mark("index")
    if reader.byte() != END_KIND:
        raise reader.fault("not an index")
    rows, digest = _read_index(reader)
    return _summary(header, rows, digest.hex(), end)


def _row(frame: Frame) -> Row:
    first = CODED_KIND if frame.code else MIXED_KIND
    return RAW if frame.kind == RAW else first + frame.streams - 1, frame.size, len(frame.payload)


def _summary(header: Header, rows: list[Row], digest: str, compressed: int) -> Summary:
    frames = tuple((KINDS[kind & ~31], size, length) for kind, size, length in rows)
    total = sum(size for _, size, _ in rows)
    return Summary(size=total, compressed=compressed, frames=frames, digest=digest, header=header)


def _read_fully(source: BinaryIO, size: int) -> bytes:
    """As many bytes as there are, up to `size`: a pipe gives fewer at a time."""
    parts, wanted = [], size
    while wanted and (part := source.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


def _pack_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _checked(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "little")


def _pack_header(header: Header) -> bytes:
    flags = (LENGTH_KNOWN if header.length is not None else 0) | (WITH_NETWORK if header.model else 0)
    fixed = bytes([VERSION, flags, header.slots, INTEGERS, PROBABILITY_BITS, BYTES])
    length = b"" if header.length is None else _pack_varint(header.length)
    return _checked(MAGIC + fixed + length + bytes.fromhex(header.model))


def _read_header(reader: _Reader) -> Header:
    if reader.read(4) != MAGIC:
        raise DataError("not a .lut file", hint="give a file that `luthier compress` wrote")
    version, flags, slots, mode, bits, tokenizer = reader.read(6)
    if version != VERSION:
        raise DataError(f"version {version} of the format, expected {VERSION}", hint="pip install --upgrade luthier")
    length = reader.varint() if flags & LENGTH_KNOWN else None
    model = reader.read(32).hex() if flags & WITH_NETWORK else ""
    reader.check()
    if (flags & ~3, mode, bits, tokenizer) != (0, INTEGERS, PROBABILITY_BITS, BYTES) or not 12 <= slots <= 24:
        raise DataError("the file uses what this version does not know", hint="pip install --upgrade luthier")
    return Header(slots=slots, length=length, model=model)


def _pack_frame(frame: Frame, data: bytes) -> bytes:
    kind, size, length = _row(frame)
    numbers = [size] + [length] * (frame.kind == MIXED) + [frame.code] * (frame.code > 0)
    fields = bytes([kind]) + b"".join(_pack_varint(number) for number in numbers)
    before = zlib.crc32(fields + frame.payload)
    return fields + frame.payload + zlib.crc32(data, before).to_bytes(4, "little")


def _read_frames(reader: _Reader, most_codes: int) -> Iterator[Frame]:
    """The frames up to the index, without the checks that follow them; the first byte of the index is read.

    most_codes: how many segment codes the network knows.
    """
    number = 0
    while True:
        reader.mark(f"frame {number}")
        kind = reader.byte()
        if kind == END_KIND:
            reader.mark("index")
            reader.taken = bytes([END_KIND])
            return
        _check_kind(reader, kind)
        size = reader.varint()
        length = reader.varint() if kind else size
        if not 1 <= size <= MOST_FRAME or length > size:
            raise reader.fault(f"{length:,} bytes for {size:,} bytes of text")
        code = reader.varint() if kind >= CODED_KIND else 0
        if kind >= CODED_KIND and not 1 <= code <= most_codes:
            raise reader.fault(f"its segment code is {code:,}, and the network's are 1 to {most_codes:,}")
        payload = reader.read(length)
        yield Frame(MIXED if kind else RAW, size, (kind & 31) + 1 if kind else 0, payload, code)
        number += 1


def _check_kind(reader: _Reader, kind: int) -> None:
    if kind & ~31 not in KINDS or RAW < kind < MIXED_KIND:
        raise reader.fault(f"its kind is {kind}, which this version does not know")


def _pack_index(rows: list[Row], digest: bytes) -> bytes:
    entries = [bytes([kind]) + _pack_varint(size) + _pack_varint(length) for kind, size, length in rows]
    block = _checked(bytes([END_KIND]) + _pack_varint(len(rows)) + b"".join(entries) + digest)
    return block + len(block).to_bytes(4, "little")


def _read_index(reader: _Reader) -> tuple[list[Row], bytes]:
    """Its rows and the digest; the first byte is read already."""
    rows = [(reader.byte(), reader.varint(), reader.varint()) for _ in range(reader.varint())]
    digest = reader.read(16)
    reader.check()
    length = len(reader.taken)
    if int.from_bytes(reader.read(4), "little") != length:
        raise reader.fault("its length differs")
    for kind, _, _ in rows:
        _check_kind(reader, kind)
    return rows, digest
