"""A causal language model one decoder layer at a time, from its safetensors files: never the whole of it in memory.

The model exists once without storage, on torch's device `meta`. What stands before the layers, or after them, gets its
weights for as long as it is used; the model's own forward then runs with layers that only record what they are given,
so that masks and position embeddings are those that transformers makes. A layer is a copy with weights of its own.

All tensors are checked by name and shape when the folder is opened, and for NaN when they are read.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from luthier.core.errors import CheckpointError
from luthier.core.files import read_json, sha256_bytes
from luthier.models.load import UNLOADABLE, check_weight_files, shorten
from luthier.models.register import register_config

LAYER_LISTS = ("layers", "h", "blocks")  # what architectures call the list of their decoder layers
DAMAGED = "the file is damaged or of another model: copy or download it again"
UNSUPPORTED = "architectures like Llama, Qwen3, Qwen3-MoE, Gemma 3, OLMo 2, Mistral and Instella can be streamed"
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # buffers that old versions of transformers saved

Arguments = Mapping[str, Any]


class LayerStream:
    """The layers of a model folder, and what stands before and after them. `config` is transformers'."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.config, self.folder = model.config, folder
        self._model = model
        self._list_name, self._layers = decoder_layers(model)
        self._files = _Files(folder, model.all_tied_weights_keys)
        self._files.check(model)

    @classmethod
    def open(cls, folder: Path) -> LayerStream:
        """Open a model folder with safetensors weights. Reads config.json and the headers of the weight files only.

        Raises: CheckpointError for a folder that is none, an architecture that cannot be streamed, a source that is
        quantized already, and for tensors that are missing, unexpected or mis-shaped.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no model folder (it has no config.json)", hint="check the path")
        if read_json(folder / "config.json").get("quantization_config"):
            raise CheckpointError(f"{folder}: is quantized already", hint="give the original model")
        register_config()
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except UNLOADABLE as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{folder}: not an architecture that can be streamed ({reason})", hint=UNSUPPORTED
            ) from error
        return cls(model.eval().requires_grad_(False), folder)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @property
    def identity(self) -> str:
        """Names the weights without reading them: sizes and times of the files, and the configuration."""
        files = sorted(self.folder.glob("*.safetensors"))
        stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return sha256_bytes(json.dumps([stats, self.config.to_dict()], sort_keys=True, default=str).encode())

    def prefix(self, index: int) -> str:
        """The module path of a layer, such as model.layers.3."""
        return f"{self._list_name}.{index}"

    def load_layer(
        self, index: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """A layer with its weights, in evaluation mode, without gradients; CheckpointError naming a tensor with NaN."""
        layer = copy.deepcopy(self._layers[index], {id(self.config): self.config})
        for name in layer.state_dict():
            _assign(layer, name, self._files.read(f"{self.prefix(index)}.{name}", device, dtype))
        _compute_buffers(self._model, layer, device)
        return layer.requires_grad_(False)

    @torch.no_grad()
    def start(
        self, input_ids: Tensor, device: torch.device | str = "cpu", batch_size: int = 8
    ) -> tuple[Iterator[Tensor], tuple[Arguments, ...]]:
        """What the first layer is given for windows of equal length (n, tokens), and each layer's other arguments.

        Hidden states come in batches (≤ batch_size, tokens, hidden), fp32 on the device. The arguments are keywords on
        the device, good for a batch of any size. CheckpointError for an architecture in which they depend on the text,
        or which computes something between its layers.
        """
        window = input_ids[:1].to(device)
        with self._weights(without=self._model.get_output_embeddings(), device=device):
            _, alone = self._recorded(window)
            _, together = self._recorded(torch.cat([window, window.flip(1)]))  # another text, and another batch size
        for index, arguments in enumerate(alone):
            for name, value in arguments.items():
                if not _fits(value, together[index].get(name)):
                    raise CheckpointError(
                        f"{type(self._model).__name__}: layer {index} takes {name!r}, which depends on the text",
                        hint=UNSUPPORTED,
                    )
        return self._embedded(input_ids, device, batch_size), alone

    @torch.no_grad()
    def _embedded(self, input_ids: Tensor, device: torch.device | str, batch_size: int) -> Iterator[Tensor]:
        with self._weights(without=self._model.get_output_embeddings(), device=device):
            for batch in input_ids.split(batch_size):
                yield self._recorded(batch.to(device))[0].float()

    @torch.no_grad()
    def finish(self, hidden: Iterable[Tensor], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Logits (batch, tokens, vocabulary) on the device for each batch of what the last layer gave."""
        with self._weights(without=self._model.get_input_embeddings(), device=device):
            for batch in hidden:
                batch = batch.to(device)
                with _replaced_forwards(self._layers, lambda index, given, arguments, out=batch: out):
                    yield self._model(inputs_embeds=batch, use_cache=False).logits

    def _recorded(self, input_ids: Tensor) -> tuple[Tensor, tuple[Arguments, ...]]:
        """The hidden states that the first layer is given, and the other arguments of all layers."""
        hidden, rows = list[Tensor](), list[Arguments]()

        def record(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            if index != len(rows) or (hidden and given is not hidden[0]):
                raise CheckpointError(
                    f"{type(self._model).__name__}: computes something between its layers {index - 1} and {index}",
                    hint=UNSUPPORTED,
                )
            hidden[:] = [given]
            rows.append(arguments)
            return given

        body = getattr(self._model, self._model.base_model_prefix, self._model)
        with _replaced_forwards(self._layers, record):
            body(input_ids=input_ids, use_cache=False)
        if len(rows) != self.num_layers:
            raise CheckpointError(
                f"{type(self._model).__name__}: ran {len(rows)} of {self.num_layers} layers", hint=UNSUPPORTED
            )
        return hidden[0], tuple(rows)

    @contextlib.contextmanager
    def _weights(self, without: nn.Module | None, device: torch.device | str) -> Iterator[None]:
        """Give everything but the layers, and but one module, its weights for a while."""
        model, kept = self._model, dict[tuple[nn.Module, str], Any]()
        skipped = {id(p) for p in without.parameters()} if without is not None and not self._tied else set()
        outside = {
            name: module for name, module in model.named_modules() if not f"{name}.".startswith(f"{self._list_name}.")
        }
        try:
            for prefix, module in outside.items():
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is None or id(tensor) in skipped or name in module._non_persistent_buffers_set:
                        continue
                    kept[module, name] = tensor
                    full = f"{prefix}.{name}" if prefix else name
                    _assign(module, name, self._files.read(full, device, torch.float32))
            for module in outside.values():
                if not isinstance(module, nn.ModuleList):
                    _compute_buffers(model, module, device, deep=False, kept=kept)
            yield
        finally:
            for (module, name), tensor in kept.items():
                (module._parameters if name in module._parameters else module._buffers)[name] = tensor

    @property
    def _tied(self) -> bool:
        head = self._model.get_output_embeddings()
        return head is not None and head.weight is self._model.get_input_embeddings().weight


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the modules of a model's decoder layers. CheckpointError unless there is exactly one such list."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and name.rpartition(".")[2] in LAYER_LISTS
    }
    if len(found) != 1:
        raise CheckpointError(
            f"{type(model).__name__}: {len(found)} lists of decoder layers in it, expected 1", hint=UNSUPPORTED
        )
    return next(iter(found.items()))  # type: ignore[return-value]


class _Files:
    """The tensors of a folder under the names of the module: experts' matrices come stacked, tied ones once."""

    def __init__(self, folder: Path, tied: Mapping[str, str]) -> None:
        check_weight_files(folder)
        self._tied = tied
        self._shapes = dict[str, tuple[int, ...]]()
        self._paths = dict[str, Path]()
        for path in _weight_files(folder):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._paths[name] = path
        self._folder = folder

    def sources(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors in the files that make up a tensor of the model, or its own name where the files lack them."""
        match = _EXPERTS.fullmatch(name)
        if name in self._shapes:
            return [name]
        if name in self._tied:
            return [self._tied[name]]
        if match:
            parts = _EXPERT_PARTS[match[2]]
            return [f"{match[1]}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]
        return [next((head for head, source in self._tied.items() if source == name and head in self._shapes), name)]

    def check(self, model: PreTrainedModel) -> None:
        """CheckpointError with the names of tensors that are missing, mis-shaped or unexpected."""
        problems: dict[str, list[str]] = {"missing": [], "mis-shaped": [], "unexpected": []}
        used, self._expected = set[str](), dict[str, tuple[int, ...]]()
        for name, tensor in model.state_dict().items():
            shape = self._expected[name] = tuple(tensor.shape)
            sources = self.sources(name, shape)
            part = _part_shape(shape, len(sources))
            used.update(sources)
            for source in sources:
                found = self._shapes.get(source)
                if found is None:
                    problems["missing"].append(source)
                elif found != part:
                    problems["mis-shaped"].append(f"{source} (file {found}, model {part})")
        ignored = [_IGNORED, *(re.compile(rf".*{p}.*") for p in model._keys_to_ignore_on_load_unexpected or ())]
        unexpected = set(self._shapes) - used - set(self._tied)
        problems["unexpected"] = [n for n in sorted(unexpected) if not any(p.fullmatch(n) for p in ignored)]
        told = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names]
        if told:
            raise CheckpointError(
                f"{self._folder}: the weights do not fit config.json: {'; '.join(told)}",
                hint="use the config.json that belongs to these weights; their names must be those of the modules",
            )

    def read(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model; integers keep their type. CheckpointError when it holds NaN or infinity."""
        shape = self._expected[name]
        sources = self.sources(name, shape)
        if len(sources) == 1 and self._shapes[sources[0]] == shape:
            return self._read_one(sources[0], device, dtype)
        whole = torch.empty(shape, device=device, dtype=dtype)
        places = whole.view(len(sources), -1, shape[-1])
        for place, source in zip(places, sources, strict=True):
            place.copy_(self._read_one(source, device, dtype))
        return whole

    def _read_one(self, source: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        with safe_open(self._paths[source], "pt") as file:
            tensor = file.get_tensor(source)
        if not tensor.is_floating_point():
            return tensor.to(device)
        tensor = tensor.to(device, dtype, copy=True)  # never a view of the mapped file
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._paths[source]}: {source} has values that are NaN or infinite", hint=DAMAGED)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"{folder}: has no model.safetensors",
            hint="only safetensors can be streamed; load and save the model with transformers to convert others",
        )
    return [folder / "model.safetensors"]


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of one of the matrices that are stacked to `shape` (experts, out, in)."""
    return shape if parts == 1 else (shape[0] * shape[1] // parts, shape[2])


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[last] = value


@torch.no_grad()
def _compute_buffers(
    model: PreTrainedModel,
    module: nn.Module,
    device: torch.device | str,
    *,
    deep: bool = True,
    kept: dict[tuple[nn.Module, str], Any] | None = None,
) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, as transformers does after loading."""
    for owner in module.modules() if deep else [module]:
        names = [name for name in owner._non_persistent_buffers_set if owner._buffers.get(name) is not None]
        for parameter in owner.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks loaded ones
        found = list[dict[str, Tensor]]()
        for filling in (0, 1) if names else ():  # what is not computed keeps what it was filled with
            for name in names:
                empty: Any = owner._buffers[name]
                if kept is not None:
                    kept.setdefault((owner, name), empty)
                owner._buffers[name] = torch.full_like(empty, filling, device=device)
            model._init_weights(owner)
            found.append({name: owner.get_buffer(name) for name in names})
        for name in names:
            if not torch.equal(found[0][name], found[1][name]):
                raise CheckpointError(
                    f"{type(owner).__name__}: does not say how its buffer {name!r} is computed", hint=UNSUPPORTED
                )


@contextlib.contextmanager
def _replaced_forwards(layers: nn.ModuleList, answer: Any) -> Iterator[None]:
    """Layers that answer with `answer(index, hidden, other arguments by name)`."""
    for index, layer in enumerate(layers):
        signature = inspect.signature(layer.forward)

        def forward(*args: Any, _index: int = index, _signature: Any = signature, **kwargs: Any) -> Any:
            first, *positional = _signature.parameters
            hidden = args[0] if args else kwargs.pop(first)
            return answer(_index, hidden, {**dict(zip(positional, args[1:], strict=False)), **kwargs})

        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _fits(alone: Any, together: Any) -> bool:
    """Whether an argument recorded for one window serves any number of them."""
    if isinstance(alone, Tensor) and isinstance(together, Tensor):
        if alone.dim() != together.dim():
            return False
        return all(a in (1, b) for a, b in zip(alone.shape, together.shape, strict=True)) and bool(
            (alone == together).all()
        )
    if isinstance(alone, tuple | list) and type(alone) is type(together) and len(alone) == len(together):
        return all(map(_fits, alone, together))
    if isinstance(alone, Mapping) and isinstance(together, Mapping):
        return alone.keys() == together.keys() and all(_fits(alone[key], together[key]) for key in alone)
    return type(alone) is type(together) and (alone is None or isinstance(alone, Tensor) or alone == together)
