"""What general-purpose compressors make of a text: the baselines beside a language model's bits per byte.

| name  | command line      | looks back                                                      |
|-------|-------------------|-----------------------------------------------------------------|
| gzip  | gzip -9           | 32 kB                                                           |
| bzip2 | bzip2 -9          | within blocks of 900 kB                                         |
| xz    | xz -9e            | 64 MiB; with a given text, as far as it reaches (up to 1.5 GiB) |
| zstd  | zstd -19 --long   | 128 MiB; with a given text, as far as it reaches (up to 2 GiB)  |
| ppmd  | 7z's PPMd, var. I | all of it: order 6, in 256 MiB of memory                        |
| zpaq  | zpaq -m5          | all of it, in blocks of 64 MiB                                  |

Sizes are those of whole files, headers and checksums included (PPMd's stream has none). The last two predict the next
byte or bit from contexts, as a language model does: whoever beats only the others has beaten little.
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from luthier.core.errors import ConfigError, DataError, MissingExtra, did_you_mean, require

XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 << 20  # of preset 9
XZ_MAX_WINDOW = 1536 << 20
ZSTD_WINDOW_LOG = 27  # what --long means
ZSTD_MAX_WINDOW_LOG = 31
PPMD_ORDER, PPMD_MEMORY = 6, 256 << 20
ZPAQ_MISSING = "the program 'zpaq' is not installed: apt-get install zpaq (or from mattmahoney.net/dc/zpaq.html)"


def compressed_bytes(name: str, data: bytes, *, given: bytes = b"") -> int:
    """Bytes that a compressor (a key of COMPRESSORS or of PREDICTORS) needs for `data`.

    With `given`, it may refer to a text that the receiver has already: the fair comparison with a model that was
    trained on that text. zstd takes `given` as its prefix dictionary. The others take none, and the number is
    C(given + data) - C(given); for gzip and bzip2, which hardly look back, that gains little.

    Raises: ConfigError for an unknown name; MissingExtra for zstd or ppmd without its package, or zpaq without its
    program.
    """
    known = {**COMPRESSORS, **PREDICTORS}
    if name not in known:
        raise ConfigError(f"unknown compressor {name!r}{did_you_mean(name, known)}", hint=f"one of {', '.join(known)}")
    return known[name](data, given)


def missing(name: str) -> str:
    """Why a compressor cannot run here, with the command that installs it; empty where it can."""
    if name == "zpaq" and shutil.which("zpaq") is None:
        return ZPAQ_MISSING
    package = {"zstd": "zstandard", "ppmd": "pyppmd"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"the package {package!r} is not installed: pip install {package}"
    return ""


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


def _ppmd(data: bytes, given: bytes) -> int:
    pyppmd = require("pyppmd", "torch")

    def compress(text: bytes) -> bytes:
        found: bytes = pyppmd.compress(text, max_order=PPMD_ORDER, mem_size=PPMD_MEMORY, variant="I")
        return found

    return _difference(compress, data, given)


def _zpaq(data: bytes, given: bytes) -> int:
    if shutil.which("zpaq") is None:
        raise MissingExtra(ZPAQ_MISSING.partition(":")[0], hint=ZPAQ_MISSING.partition(": ")[2])
    return _difference(_zpaq_archive, data, given)


def _zpaq_archive(data: bytes) -> bytes:
    """The archive of one file, which the program reads and writes by name only."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_bytes(data)
        command = ["zpaq", "add", "archive.zpaq", "text", "-method", "5", "-threads", "1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"zpaq failed: {done.stderr.strip()[-200:]}", hint="leave zpaq out")
        return (Path(folder) / "archive.zpaq").read_bytes()


COMPRESSORS: dict[str, Callable[[bytes, bytes], int]] = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}
PREDICTORS: dict[str, Callable[[bytes, bytes], int]] = {"ppmd": _ppmd, "zpaq": _zpaq}
"""Slower by one or two orders of magnitude, and the ones to beat."""
