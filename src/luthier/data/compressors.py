"""What general-purpose compressors make of a text: the baselines beside a language model's bits per byte.

| name  | command line      | looks back                                                      |
|-------|-------------------|-----------------------------------------------------------------|
| gzip  | gzip -9           | 32 kB                                                           |
| bzip2 | bzip2 -9          | within blocks of 900 kB                                         |
| xz    | xz -9e            | 64 MiB; with a given text, as far as it reaches (up to 1.5 GiB) |
| zstd  | zstd -19 --long   | 128 MiB; with a given text, as far as it reaches (up to 2 GiB)  |

Sizes are those of whole files, headers and checksums included.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

from luthier.core.errors import ConfigError, did_you_mean, require

XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 << 20  # of preset 9
XZ_MAX_WINDOW = 1536 << 20
ZSTD_WINDOW_LOG = 27  # what --long means
ZSTD_MAX_WINDOW_LOG = 31


def compressed_bytes(name: str, data: bytes, *, given: bytes = b"") -> int:
    """Bytes that a compressor (a key of COMPRESSORS) needs for `data`.

    With `given`, it may refer to a text that the receiver has already: the fair comparison with a model that was
    trained on that text. zstd takes `given` as its prefix dictionary. The others take none, and the number is
    C(given + data) - C(given); for gzip and bzip2, which hardly look back, that gains little.

    Raises: ConfigError for an unknown name; MissingExtra for zstd without its package.
    """
    if name not in COMPRESSORS:
        raise ConfigError(
            f"unknown compressor {name!r}{did_you_mean(name, COMPRESSORS)}", hint=f"one of {', '.join(COMPRESSORS)}"
        )
    return COMPRESSORS[name](data, given)


def _gzip(data: bytes, given: bytes) -> int:
    return _difference(lambda text: gzip.compress(text, 9, mtime=0), data, given)


def _bzip2(data: bytes, given: bytes) -> int:
    return _difference(lambda text: bz2.compress(text, 9), data, given)


def _xz(data: bytes, given: bytes) -> int:
    window = min(XZ_MAX_WINDOW, max(XZ_WINDOW, len(given) + len(data) if given else 0))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": XZ_PRESET, "dict_size": window}]
    return _difference(lambda text: lzma.compress(text, filters=filters), data, given)


def _zstd(data: bytes, given: bytes) -> int:
    zstandard = require("zstandard", "torch")
    total = len(given) + len(data)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19,
        source_size=total,  # sizes the match tables for the dictionary too
        window_log=min(ZSTD_MAX_WINDOW_LOG, max(ZSTD_WINDOW_LOG, total.bit_length())),
        enable_ldm=True,
        write_checksum=True,
    )
    prefix = zstandard.ZstdCompressionDict(given, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if given else None
    return len(zstandard.ZstdCompressor(compression_params=parameters, dict_data=prefix).compress(data))


def _difference(compress: Callable[[bytes], bytes], data: bytes, given: bytes) -> int:
    return len(compress(given + data)) - len(compress(given)) if given else len(compress(data))


COMPRESSORS: dict[str, Callable[[bytes, bytes], int]] = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}
