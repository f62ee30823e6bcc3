"""Hidden states of all windows: on the device, in memory, or in a file where neither can hold them.

Small stores keep fp32. Larger ones keep fp16, as the published code does; a power of two for each token is taken out
where values would not fit, so that the large activations of some models survive.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError, ConfigError
from luthier.quantize.memory import HALF_ABOVE, available_memory

LARGEST = 15  # values in fp16 stay below 2 ** 15


class HiddenStates:
    """A store of hidden states (windows, tokens, hidden); what is read comes to `device` in fp32.

    folder: where the file goes; it is removed from the folder at once and vanishes with the process, whatever happens.
    on_device: keep the values on the device. Otherwise they are in memory, pinned where the device is a GPU.
    Raises: ConfigError when the folder has too little room.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        *,
        folder: Path | None = None,
        on_device: bool = False,
    ) -> None:
        self.shape, self.device = shape, torch.device(device)
        size = shape[0] * shape[1] * shape[2]
        dtype = torch.float16 if 4 * size > HALF_ABOVE else torch.float32
        self.num_bytes = size * dtype.itemsize
        if folder is not None:
            self.place = f"a file in {folder}"
            self._values = _mapped(folder, size, dtype).view(shape)
        else:
            self.place = str(self.device) if on_device else "memory"
            where = self.device if on_device else torch.device("cpu")
            pinned = where.type == "cpu" and self.device.type == "cuda"
            self._values = torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)
        self._powers: Tensor | None = None
        if dtype == torch.float16:
            self._powers = torch.zeros(*shape[:2], 1, dtype=torch.int16, device=self._values.device)

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, start: int, values: Tensor) -> None:
        """Set the windows from `start` on; CheckpointError for values that are not finite."""
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"hidden states of windows {start} to {start + len(values)} are NaN or infinite",
                hint="the model overflows on this text: check its weights",
            )
        stop = start + len(values)
        if self._powers is not None:
            largest = torch.frexp(values.float().abs().amax(-1, keepdim=True)).exponent
            powers = (largest - LARGEST).clamp(min=0)
            self._powers[start:stop].copy_(powers)
            values = torch.ldexp(values.float(), -powers)
        self._values[start:stop].copy_(values)

    def read(self, start: int, stop: int) -> Tensor:
        """Windows `start` to `stop` as (windows, tokens, hidden), fp32 on the device; a copy."""
        values = self._values[start:stop].to(self.device, non_blocking=True).to(torch.float32, copy=True)
        if self._powers is not None:
            values = torch.ldexp(values, self._powers[start:stop].to(self.device))
        return values

    def close(self) -> None:
        """Give the memory, or the file, back."""
        self._values = self._values.new_empty(0, *self.shape[1:])
        self._powers = None

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mapped(folder: Path, size: int, dtype: torch.dtype) -> Tensor:
    """`size` numbers in a nameless file. The room is reserved at once: a full disk would kill the process later."""
    needed = max(1, size) * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".activations-", suffix=".partial", dir=folder)
        try:
            os.posix_fallocate(handle, 0, needed)
            return torch.from_file(path, shared=True, size=size, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        raise ConfigError(
            f"spill: {folder} cannot hold {needed / 2**30:.2f} GiB of activations ({error.strerror or error})",
            hint="give a folder on a larger disk, or lower samples or sequence_length",
        ) from error


def check_memory(needed: int) -> None:
    """ConfigError where the system has less memory left than `needed` bytes: the process would be killed half-way."""
    available = available_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"activations need {needed / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB are free",
            hint="add --spill FOLDER to keep them in a file, or lower samples or sequence_length",
        )
