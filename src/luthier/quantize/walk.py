"""The outer loop: layer after layer, from the first to the last (section 3.4 of arXiv 2511.10645).

Two chains of hidden states go through the model. The original's outputs are the targets; the quantized model's own
outputs are the inputs, so that each layer corrects what those before it have done. Each finished layer is saved before
the next begins. A run that was stopped goes on from there: finished layers are only run through, and the result is
that of a run without a stop.

Departure: two arrays of hidden states in place of three, as targets replace the original's inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.core.config import digest, to_mapping
from luthier.core.console import Console
from luthier.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from luthier.core.files import remove_leftovers, sha256_bytes
from luthier.learn.meters import prefers_bf16
from luthier.models.stream import Arguments, LayerStream
from luthier.quantize.activations import HiddenStates, check_memory
from luthier.quantize.calibration import Windows
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.layer import Bundle, LayerTask, layer_output, plan_bundles
from luthier.quantize.layer_files import LayerFiles, StoredLayer, layer_path, read_layer, save_layer
from luthier.quantize.memory import STORES, store_bytes
from luthier.quantize.weights import QuantizedWeight

Method = Callable[[LayerTask], dict[str, QuantizedWeight]]
NOT_OF_LAYERS = ("model", "data", *QuantizeConfig.RESUMABLE_CHANGES)  # weights and text count by their content
SAMPLED = 4096  # values of each tensor that tell one model's weights from another's
DEVICE_SHARE = 0.25  # of a GPU's free memory that hidden states may take
LOSSES = {"smooth-l1": F.smooth_l1_loss, "mse": F.mse_loss}


@dataclass(frozen=True)
class _Chains:
    """Hidden states of the same windows in the original model and in the quantized one."""

    original: HiddenStates
    quantized: HiddenStates


def quantize_layers(
    stream: LayerStream,
    windows: Windows,
    method: Method,
    config: QuantizeConfig,
    folder: Path,
    *,
    console: Console,
    log: Callable[..., None] = lambda kind, **row: None,
    device: torch.device | str = "cpu",
) -> Mapping[str, QuantizedWeight]:
    """Quantize all layers with `method`, and return the matrices by their names in the model, read when asked for.

    `folder` takes a file for each layer; those that are there
    already are kept. `log(kind, **values)` takes a row "layer" for each: what the method says, losses on the validation
    windows before (original weights on the quantized model's inputs) and after, the relative error, seconds.

    Raises: Interrupted on SIGINT or SIGTERM, with all finished layers saved; CheckpointError for layers in `folder`
    that were made with other settings, text or weights; DataError for ids outside the vocabulary.
    """
    _check_ids(stream, windows)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    device = torch.device(device)
    walk = _Walk(stream, method, config, folder, console, log, device, _settings(config, windows, device))
    missing = walk.missing()
    walk.verify(range(missing[-1] + 1 if missing else 0, stream.num_layers))
    if missing:
        with _interruptible(), contextlib.ExitStack() as stack:
            try:
                walk.run(windows, missing, stack)
            except KeyboardInterrupt:
                done = stream.num_layers - len(walk.missing())
                raise Interrupted(
                    f"stopped with {done} of {stream.num_layers} layers done and saved",
                    hint="run the same command again to go on from there",
                ) from None
    return LayerFiles(folder, [stream.prefix(index) for index in range(stream.num_layers)])


@dataclass
class _Walk:
    stream: LayerStream
    method: Method
    config: QuantizeConfig
    folder: Path
    console: Console
    log: Callable[..., None]
    device: torch.device
    settings: str

    def missing(self) -> list[int]:
        """Layers to make: those without a file, and those whose file is damaged."""
        return [index for index in range(self.stream.num_layers) if self.stored(index) is None]

    def stored(self, index: int) -> StoredLayer | None:
        path = layer_path(self.folder, index)
        if not path.exists():
            return None
        try:
            found = read_layer(path)
        except CheckpointError as error:
            self.console.status(f"layer {index} is made anew: {error}")
            path.unlink()
            return None
        if found.identity.partition(":")[0] != self.settings:
            raise _other(path, "settings or text")
        return found

    def verify(self, layers: Iterable[int]) -> None:
        """CheckpointError for finished layers that were made from other weights than the model has."""
        for index in layers:
            found = self.stored(index)
            if found is not None and found.identity != self._identity(self.stream.load_layer(index)):
                raise _other(layer_path(self.folder, index), "weights of the model")

    def _identity(self, layer: nn.Module) -> str:
        return f"{self.settings}:{_fingerprint(layer)}"

    def run(self, windows: Windows, missing: list[int], stack: contextlib.ExitStack) -> None:
        """Take both chains through the layers, up to the last that is missing."""
        hidden = self.stream.config.get_text_config().hidden_size
        needed = STORES * sum(store_bytes(len(ids), ids.shape[1], hidden) for ids in windows)
        on_device = self._fits_on_device(needed)
        if not on_device and self.config.spill is None:
            check_memory(needed)
        (training, arguments), (held_out, _) = (self._start(ids, stack, on_device) for ids in windows)
        self.console.status(f"hidden states in {training.original.place}, layers on {self.device}")
        last, seconds = missing[-1], list[float]()
        bar = self.console.progress(len(missing), "layers")
        advance = stack.enter_context(bar)
        for index in range(last + 1):
            began = time.perf_counter()
            row = self._layer(index, training, held_out, arguments[index])
            if index not in missing:
                continue
            seconds.append(time.perf_counter() - began)
            left = sum(later > index for later in missing) * sum(seconds) / len(seconds)
            advance(1, note=f"layer {index + 1}/{self.stream.num_layers}  {_row_text(row)}  {_clock(left)} left")

    def _fits_on_device(self, needed: int) -> bool:
        if self.device.type != "cuda" or self.config.spill is not None:
            return False
        return needed < DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0]

    def _start(
        self, ids: Tensor, stack: contextlib.ExitStack, on_device: bool
    ) -> tuple[_Chains, tuple[Arguments, ...]]:
        """Both chains before the first layer, where they are the same."""
        hidden, arguments = self.stream.start(ids, self.device, self.config.micro_batch_size)
        stores, start = list[HiddenStates](), 0
        for batch in hidden:
            if not stores:
                shape = (len(ids), batch.shape[1], batch.shape[2])
                made = (
                    HiddenStates(shape, self.device, folder=self.config.spill, on_device=on_device)
                    for _ in range(STORES)
                )
                stores = [stack.enter_context(store) for store in made]
            for store in stores:
                store.write(start, batch)
            start += len(batch)
        return _Chains(*stores), arguments

    @torch.no_grad()
    def _layer(self, index: int, training: _Chains, held_out: _Chains, arguments: Arguments) -> Mapping[str, Any]:
        """Take both chains through one layer, made first where it is missing; its row of metrics."""
        began = time.perf_counter()
        layer = self.stream.load_layer(index, self.device)
        identity = self._identity(layer)
        bundles = plan_bundles(layer, training.quantized.read(0, 1), arguments, self.config)
        for chains in (training, held_out):
            self._advance(layer, chains.original, arguments)
        found = self.stored(index)
        if found is None:
            task = LayerTask(
                index=index,
                layer=layer,
                bundles=bundles,
                inputs=training.quantized,
                targets=training.original,
                validation_inputs=held_out.quantized,
                validation_targets=held_out.original,
                arguments=arguments,
                config=self.config,
            )
            found = self._make(task, identity, began)
        elif found.identity != identity:
            raise _other(layer_path(self.folder, index), "weights of the model")
        weights = _dequantized(bundles, found.weights, self.device)
        for chains in (training, held_out):
            self._advance(layer, chains.quantized, arguments, weights)
        return found.row

    def _make(self, task: LayerTask, identity: str, began: float) -> StoredLayer:
        said = dict[str, Any]()
        task = replace(task, log=said.update)
        before, _ = self._difference(task, None)
        with torch.enable_grad():
            quantized = self.method(task)
        _check_result(task, quantized)
        loss, error = self._difference(task, _dequantized(task.bundles, quantized, self.device))
        row = {"layer": task.index, **said, "loss_before": before, "loss": loss, "relative_error": error}
        row["seconds"] = round(time.perf_counter() - began, 3)
        stored = StoredLayer(quantized, identity, row)
        save_layer(layer_path(self.folder, task.index), stored)
        self.log("layer", **row)
        return stored

    def _advance(
        self, layer: nn.Module, states: HiddenStates, arguments: Arguments, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Replace hidden states by what the layer makes of them."""
        for start, stop in self._batches(len(states)):
            states.write(start, layer_output(layer, states.read(start, stop), arguments, weights))

    def _difference(self, task: LayerTask, weights: Mapping[str, Tensor] | None) -> tuple[float, float]:
        """Mean loss, and ‖output − target‖ / ‖target‖, over the validation windows."""
        total, squares, norm = 0.0, 0.0, 0.0
        for start, stop in self._batches(len(task.validation_inputs)):
            out = task.forward(task.validation_inputs.read(start, stop), weights)
            target = task.validation_targets.read(start, stop)
            total += float(LOSSES[self.config.loss](out, target)) * (stop - start)
            squares += float((out - target).square().sum(dtype=torch.float64))
            norm += float(target.square().sum(dtype=torch.float64))
        return total / len(task.validation_inputs), (squares / max(norm, 1e-300)) ** 0.5

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        size = self.config.micro_batch_size
        return ((start, min(start + size, count)) for start in range(0, count, size))


def _check_ids(stream: LayerStream, windows: Windows) -> None:
    settings = stream.config.get_text_config()
    rows, limit = settings.vocab_size, getattr(settings, "max_position_embeddings", None)
    for ids in windows:
        if limit is not None and ids.shape[-1] > limit:
            raise ConfigError(
                f"sequence_length: got {ids.shape[-1]}, but the model reads at most {limit} tokens",
                hint=f"give --sequence-length {limit} or less",
            )
        if ids.dim() != 2 or not ids.numel():
            raise DataError(f"windows of shape {tuple(ids.shape)}, expected (n, tokens)", hint="give some text")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise DataError(
                f"token ids from {low} to {high}, but the model knows {rows}", hint="use the model's own tokenizer"
            )


def _settings(config: QuantizeConfig, windows: Windows, device: torch.device) -> str:
    """Identity of everything but the model's weights that decides a layer's codes."""
    values = {key: value for key, value in to_mapping(config).items() if key not in NOT_OF_LAYERS}
    if config.precision == "auto":  # what it means here: a device that decides otherwise makes other layers
        values["precision"] = "bf16" if prefers_bf16(device) else "fp32"
    return digest({**values, "windows": [sha256_bytes(ids.cpu().contiguous().numpy().tobytes()) for ids in windows]})


def _fingerprint(layer: nn.Module) -> str:
    """Identity of a layer's weights, from some thousand values of each: all of them would take longer to read."""
    hashed = hashlib.sha256()
    for name, tensor in layer.state_dict().items():
        values = tensor.flatten()[:: max(1, tensor.numel() // SAMPLED)]
        hashed.update(name.encode() + values.cpu().numpy().tobytes())
    return hashed.hexdigest()


def _check_result(task: LayerTask, quantized: Mapping[str, QuantizedWeight]) -> None:
    wanted = {part.name for bundle in task.bundles for part in bundle.parts}
    if set(quantized) != wanted:
        raise ValueError(f"the method gave {sorted(quantized)}, expected {sorted(wanted)}")


def _dequantized(
    bundles: tuple[Bundle, ...], quantized: Mapping[str, QuantizedWeight], device: torch.device
) -> dict[str, Tensor]:
    """The parameters that a quantized layer computes with, fp32 on the device."""
    found = dict[str, Tensor]()
    for part in (part for bundle in bundles for part in bundle.parts):
        weight = quantized[part.name]
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(weight).items() if isinstance(value, Tensor)
        }
        found[part.parameter] = replace(weight, **tensors).dequantized().reshape(part.shape)
    return found


def _other(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: was made with other {what}",
        hint="use the settings of the first run to resume, or remove the run folder to begin anew",
    )


def _row_text(row: Mapping[str, Any]) -> str:
    return f"error {row['relative_error']:.4f}  loss {row['loss_before']:.3g} → {row['loss']:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM stops like SIGINT does: at once, as every file is whole or absent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
