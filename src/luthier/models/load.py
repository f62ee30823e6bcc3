"""Model folders: strict loading of any Hugging Face causal language model, atomic saving with provenance.

A model folder is a Hugging Face folder plus `luthier.json`, which says how the model was made and holds the SHA-256 of
every weight file. Loading never runs code from a repository, and never leaves a tensor at random values.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from luthier.core.errors import CheckpointError
from luthier.core.files import atomic_folder, read_json, restore_folder, sha256_file, write_json
from luthier.models.register import register_config

PROVENANCE = "luthier.json"
NAMES_SHOWN = 5
# What transformers raises for folders that it cannot make a model of; the last three for settings of a wrong type.
UNLOADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    KeyError,
)


def load_pretrained(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str | None = None,
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub id, in evaluation mode.

    `dtype` "auto" keeps the stored one; `attention` is a transformers attention implementation such as "sdpa". `auto`
    is the Auto class to load with, for models that are no causal language models.
    CheckpointError when the folder is missing or damaged, or when any tensor is missing, unexpected or mis-shaped.
    """
    register_config()
    local = _local_folder(source)
    if local is not None:
        check_weight_files(local)
    try:
        with _quiet_transformers():
            loaded: Any = auto.from_pretrained(
                str(source),
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                local_files_only=local is not None,
                ignore_mismatched_sizes=True,  # reported below, by name, instead of the library's first-error exception
                output_loading_info=True,
            )
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{source}: cannot be loaded as a {_kind(auto)} ({reason})",
            hint="give a Hugging Face model folder with config.json and safetensors weights, or a hub id",
        ) from error
    model, report = loaded
    _check_report(source, report)
    if model.device == torch.device(device):
        return model
    model = model.to(device)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.postprocess_model(model)  # kernels are made for a device
    return model


def _kind(auto: Any) -> str:
    return "causal language model" if auto is AutoModelForCausalLM else "model"


def check_weight_files(folder: Path) -> None:
    """CheckpointError naming the file when a safetensors file of the folder is missing, truncated or not one."""
    index = folder / "model.safetensors.index.json"
    listed = set(read_json(index)["weight_map"].values()) if index.exists() else set()
    files = sorted(listed | {file.name for file in folder.glob("*.safetensors")})
    for name in files:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / name}: not a complete safetensors file ({error})",
                hint="the file is truncated or damaged: copy or download it again",
            ) from error


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder that is complete or absent; an existing one is replaced.

    `provenance` (verb, configuration, parents, versions, metrics) goes to `luthier.json`, where this function adds
    "weights": the SHA-256 of each weight file. `state_dict` replaces the model's own tensors, e.g. those gathered from
    shards or cast to bfloat16. Generation settings without special tokens get the tokenizer's.
    """
    _name_end_of_text(model, tokenizer)
    with atomic_folder(folder) as temporary, _quiet_transformers():
        model.save_pretrained(temporary, state_dict=None if state_dict is None else dict(state_dict))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_provenance(temporary, provenance)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write `luthier.json` with the hashes of the weight files that are in the folder."""
    write_json(folder / PROVENANCE, {**provenance, "weights": weight_hashes(folder)})


def weight_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each weight file of a model folder."""
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of a model folder's `luthier.json`, {} for a model that luthier did not make."""
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}


def _local_folder(source: str | Path) -> Path | None:
    """The folder that `source` means, None for a hub id; CheckpointError for a path that does not exist."""
    path = Path(source)
    restore_folder(path)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if isinstance(source, Path) or path.is_absolute() or text.startswith(".") or text.count("/") > 1 or path.exists():
        raise CheckpointError(f"{source}: no such model folder", hint="check the path, or give a hub id like org/name")
    return None


def _check_report(source: str | Path, report: Mapping[str, Any]) -> None:
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "mis-shaped": sorted(
            f"{name} (file {tuple(found)}, model {tuple(expected)})"
            for name, found, expected in report["mismatched_keys"]
        ),
    }
    found = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{source}: the weights do not fit config.json: {'; '.join(found)}",
            hint="use the config.json that belongs to these weights, or convert the checkpoint again",
        )


def shorten(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _name_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the saved generation settings the tokenizer's special tokens where they have none: generation must stop."""
    settings = getattr(model, "generation_config", None)  # absent where a model cannot generate
    if tokenizer is None or settings is None:
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(tokenizer, name))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no report tables: problems are raised by name instead."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
