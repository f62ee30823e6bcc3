"""`luthier quantize MODEL`: open model, text and run folder, quantize layer by layer, write a model folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.config import to_mapping
from luthier.core.console import Console
from luthier.core.errors import CheckpointError, ConfigError, require
from luthier.core.files import read_json
from luthier.core.run import RunFolder
from luthier.quantize.config import QuantizeConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.quantize.calibration import Windows
    from luthier.quantize.memory import Estimate
    from luthier.quantize.plan import Plan
    from luthier.quantize.weights import QuantizedWeight

NEEDED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # of a model on the hub


def dry_run(config: QuantizeConfig, console: Console) -> None:
    """Print what would be quantized, to how many bits, and about what it costs. Needs config.json only."""
    require("torch", "torch")
    require("transformers", "torch")
    from luthier.quantize.plan import plan

    empty = empty_model(config.model)
    rows, memory = plan_rows(plan(empty, config), config), expected_memory(empty, config).rows()
    console.table(f"quantize {config.model}", ("quantity", "value"), rows)
    console.table("memory at most", ("item", "size"), memory)
    console.result(dict([*rows, *memory]))


def run(config: QuantizeConfig, console: Console) -> None:
    """Quantize, or go on where an earlier run stopped, and write the model folder and the report."""
    from luthier.learn.parallel import choose_device
    from luthier.models.stream import LayerStream
    from luthier.quantize.memory import PeakMeter
    from luthier.quantize.methods import METHODS
    from luthier.quantize.plan import plan
    from luthier.quantize.walk import quantize_layers

    device, source = choose_device(config.device), source_folder(config.model)
    empty = empty_model(str(source))
    _check_length(config, empty)
    planned, expected = plan(empty, config), expected_memory(empty, config)
    stream = LayerStream.open(source)
    opened = RunFolder.open(config.out, to_mapping(config), may_change=config.RESUMABLE_CHANGES)
    with contextlib.closing(opened) as folder:
        console.table(f"quantize {config.model}", ("quantity", "value"), plan_rows(planned, config))
        console.table("memory at most", ("item", "size"), expected.rows())
        found, began = _windows(config, source, device, console), time.perf_counter()
        meter, done = PeakMeter(str(device)), len(folder.metrics("layer"))
        quantized = quantize_layers(
            stream,
            found,
            METHODS[config.method],
            config,
            config.out / "layers",
            console=console,
            log=folder.log,
            device=device,
        )
        memory, seconds = meter.line(expected, spilled=config.spill is not None), time.perf_counter() - began
        console.status(memory)
        if done == len(folder.metrics("layer")):  # nothing was left to do: what the run took was measured before
            memory = folder.summary.get("memory", memory)
        _write(config, source, quantized, folder)
        _finish(config, source, folder, memory, seconds, console)


def _check_length(config: QuantizeConfig, empty: PreTrainedModel) -> None:
    limit = getattr(empty.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        raise ConfigError(
            f"sequence_length: got {config.sequence_length}, but the model reads at most {limit} tokens",
            hint=f"give --sequence-length {limit} or less",
        )


def expected_memory(empty: PreTrainedModel, config: QuantizeConfig) -> Estimate:
    """What the run will take at most, from the shapes alone."""
    from luthier.quantize.memory import estimate, model_shapes

    return estimate(model_shapes(empty), config)


def _windows(config: QuantizeConfig, source: Path, device: torch.device, console: Console) -> Windows:
    from luthier.data.tokenizer import load_tokenizer
    from luthier.models.load import load_pretrained
    from luthier.quantize.calibration import calibration, kept_windows

    tokenizer = load_tokenizer(source)
    found = kept_windows(
        config.out / "data" / "windows.safetensors",
        lambda: calibration(config.data, tokenizer, config, lambda: load_pretrained(source, device=device)),
    )
    counts = " and ".join(f"{len(part):,}" for part in found)
    console.status(f"calibration: {config.data}, {counts} windows of {config.sequence_length} tokens")
    return found


def _write(config: QuantizeConfig, source: Path, quantized: Mapping[str, QuantizedWeight], folder: RunFolder) -> None:
    import torch

    from luthier.core.files import sha256_file
    from luthier.models.load import read_provenance
    from luthier.quantize.checkpoint import write_checkpoint

    settings = {name: getattr(config, name) for name in ("method", "pairing", "share", "rounds", "seed")}
    made = read_provenance(source)
    provenance = {
        "verb": "quantize",
        "config": to_mapping(config),
        "parents": [
            {
                "name": config.model,
                "verb": made.get("verb", ""),
                "chat": made.get("chat", False),
                "config_sha256": sha256_file(source / "config.json"),
            }
        ],
        "data": [{"name": config.data, "sha256": sha256_file(config.out / "data" / "windows.safetensors")}],
        "env": folder.env,
    }
    write_checkpoint(
        source,
        config.out / "model",
        quantized,
        config_extra={"luthier": settings},
        dtype=getattr(torch, config.dtype),
        provenance=provenance,
        pseudo=config.pseudo,
    )


def _finish(
    config: QuantizeConfig, source: Path, folder: RunFolder, memory: str, seconds: float, console: Console
) -> None:
    from luthier.report.html import write_report

    model, rows = config.out / "model", folder.metrics("layer")
    before, after = (sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (source, model))
    bits, tables = _contents(config, model)
    headline = {
        **bits,
        "weights on disk": f"{after / 1e6:,.2f} MB (from {before / 1e6:,.2f})",
        "relative error after the last layer": f"{rows[-1]['relative_error']:.4f}" if rows else "—",
        "time": f"{sum(row['seconds'] for row in rows) / 60:.1f} min",
        "peak memory": _short(memory),
    }
    summary = {"verb": "quantize", "headline": headline, "tables": [*tables, _layer_table(rows)], "memory": memory}
    folder.write_summary(summary)
    report = write_report(folder.path)
    for name, value in headline.items():
        console.print(f"{name}: {value}")
    console.print(f"model: {model}")
    console.print(f"report: {report}")
    console.print(f"how far it is from the original: luthier compare {config.model} {model}")
    console.print(f"talk to it: luthier chat {model}")
    console.result({**headline, "seconds": seconds, "model": str(model), "report": str(report)})


def _short(memory: str) -> str:
    """'51.6 MiB (estimated 26.3 MiB)' of a line of `PeakMeter`: that of the device where the layers were."""
    measured, _, estimated = memory.rpartition("; GPU ")[2].removeprefix("peak: memory ").partition(", estimated ")
    return f"{measured} (estimated {estimated})"


def _contents(config: QuantizeConfig, model: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What of the headline, and which tables, tell where the bits are; nothing for ordinary weights."""
    if config.pseudo:
        from luthier.quantize.plan import BYTES

        return {"bits per weight": f"{8 * BYTES[config.dtype]} (values of {config.bits} bits)"}, []
    from luthier.cli.inspect import tables
    from luthier.quantize.inspect import inspect_checkpoint

    found = inspect_checkpoint(model)
    return {"bits per weight, with metadata": f"{found.body.total_bits:.3f}"}, tables(found)


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    formats = {"loss_before": ".3g", "loss": ".3g", "relative_error": ".4f", "seconds": ".1f"}
    cells = [[row["layer"], *(format(row[key], digits) for key, digits in formats.items())] for row in rows]
    return {
        "title": "Layers",
        "columns": ["layer", "loss before", "loss after", "relative error", "seconds"],
        "rows": cells,
        "note": "On the validation windows. Before: original weights on what the quantized layers before it give.",
    }


def plan_rows(planned: Plan, config: QuantizeConfig) -> list[tuple[str, str]]:
    """(quantity, value with unit) of the whole run."""
    from luthier.quantize.plan import ASSUMED_UTILIZATION, DEVICES

    codes, metadata = planned.body_bits
    hours = (f"{planned.flops / (peak * ASSUMED_UTILIZATION) / 3600:.2f} h on one {n}" for n, peak in DEVICES.items())
    return [
        ("decoder layers", f"{planned.layers:,}"),
        ("matrices to quantize", f"{len(planned.matrices):,}"),
        ("weights in them", f"{planned.weights:,}"),
        ("other parameters", f"{planned.other_parameters:,}, kept in {config.dtype}"),
        ("codes", f"{codes:.3f} bits per weight"),
        ("metadata", f"{metadata:.3f} bits per weight (steps, zero points, rotations, scales)"),
        ("whole file", f"{planned.file_bits:.3f} bits per parameter, {planned.file_bytes / 1e6:,.1f} MB"),
        ("calibration", f"{config.samples * config.sequence_length:,} tokens in {config.samples:,} windows"),
        ("operations", f"about {planned.flops:.2g} FLOP"),
        (f"time at {ASSUMED_UTILIZATION:.0%} of peak", ", ".join(hours)),
    ]


def empty_model(name: str) -> PreTrainedModel:
    """The model without storage, from its config.json: in its folder, among luthier's recipes, or on the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from luthier.cli.run import recipe_folder
    from luthier.models.load import UNLOADABLE

    shipped = recipe_folder() / "architectures" / name
    where = shipped if (shipped / "config.json").is_file() and not Path(name).exists() else _local(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where))
    except UNLOADABLE as error:
        raise _unusable(name, error) from error


def source_folder(name: str) -> Path:
    """The folder of the model to quantize; one on the hub is downloaded first. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    from luthier.models.load import UNLOADABLE

    folder = _local(name)
    if isinstance(folder, str):
        try:
            folder = Path(snapshot_download(folder, allow_patterns=list(NEEDED_FILES)))
        except UNLOADABLE as error:
            raise _unusable(name, error) from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json, so it is no model folder", hint="give a Hugging Face model folder"
        )
    if read_json(folder / "config.json").get("quantization_config"):
        raise CheckpointError(
            f"{folder}: is quantized already", hint="give the original model; `luthier inspect` says what this one is"
        )
    return folder


def _local(name: str) -> Path | str:
    """The folder of that name, or the name itself where it can be a hub id. Raises CheckpointError for other paths."""
    path = Path(name).expanduser()
    inside = path / "model"
    if path.is_dir():
        return inside if (inside / "config.json").is_file() and not (path / "config.json").exists() else path
    if len(path.parts) != 2 or name.startswith((".", "~", "/")) or path.parent.exists():
        raise CheckpointError(f"{name}: no such model folder", hint="check the path, or give a hub id like org/name")
    return name


def _unusable(name: str, error: BaseException) -> CheckpointError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(
        f"{name}: cannot be used as a causal language model ({reason})",
        hint="give a model folder with config.json and safetensors weights, or a hub id that can be reached",
    )
