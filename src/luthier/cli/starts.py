"""What a run may start from as users name it: the run folder of an earlier training, a model folder, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.files import read_json
from luthier.core.run import RunFolder
from luthier.models.arithmetic import Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from luthier.train.start import ModelStart

TRAININGS = ("pretrain", "extend")  # verbs whose training states hold weights and moments by name


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a dry run needs of an Instella: its dimensions, RoPE base and longest context in tokens."""

    dimensions: Dimensions
    theta: float
    length: int


def model_source(spec: str) -> str:
    """The model folder that a run folder, a model folder or a hub id means. CheckpointError for a run without one."""
    folder = Path(spec).expanduser()
    if not is_run(folder):
        return str(folder) if folder.exists() else spec
    if not (folder / "model" / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: this run has no model, expected one that has ended",
            hint="run it to its end first, or give the folder of the stage that makes a model",
        )
    return str(folder / "model")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "config.yaml").is_file()


def open_start(spec: str, optimizer: str) -> ModelStart:
    """Weights and moments of a run folder, or weights alone of a model folder or hub id.

    ConfigError when the run's moments are those of another optimizer; CheckpointError when it has none.
    """
    from luthier.train.start import ModelStart, RunStart, read_config

    source, folder = model_source(spec), Path(spec).expanduser()
    config = read_config(source)
    if not is_run(folder):
        return ModelStart(name=spec, source=source, config=config)
    run = RunFolder.read(folder)
    verb, steps = run.summary.get("verb", "unknown verb"), run.checkpoint_steps()
    if verb not in TRAININGS or not steps:
        raise CheckpointError(
            f"start: {folder} is a run of {verb} with {len(steps) if verb in TRAININGS else 'no such'} training states",
            hint=f"give {source} to take its weights, with new moments",
        )
    if (other := run.config.get("optimizer")) != optimizer:
        raise ConfigError(
            f"optimizer: got {optimizer}, but the moments of {folder} are those of {other}",
            hint=f"give --optimizer {other}, or start from {source} with new moments",
        )
    return RunStart(name=spec, source=source, config=config, state=run.checkpoints / f"step-{steps[-1]:08d}")


def start_tokenizer(start: ModelStart, given: str) -> PreTrainedTokenizerFast:
    """The start's own tokenizer. ConfigError when another one is given beside it."""
    from luthier.data.tokenizer import load_tokenizer, tokenizer_digest

    own = load_tokenizer(start.source)
    if given and tokenizer_digest(load_tokenizer(given)) != tokenizer_digest(own):
        raise ConfigError(
            f"tokenizer: {given} is another one than that of {start.name}", hint="drop --tokenizer: the start has one"
        )
    return own


def parent(start: ModelStart) -> dict[str, Any]:
    """The start as an entry of a model's provenance."""
    from luthier.models.load import weight_hashes
    from luthier.train.start import RunStart

    folder = Path(start.source)
    hashes = weight_hashes(folder) if folder.is_dir() else {}  # the hub has its own
    return {"model": start.source, "weights": hashes, "moments": isinstance(start, RunStart)}


def has_chatted(start: ModelStart) -> bool:
    """Whether the start has learned from conversations; True where another program made it, which says nothing."""
    from luthier.models.load import read_provenance

    made = read_provenance(Path(start.source))
    return bool(made.get("chat", not made))


def outline(spec: str) -> Outline | None:
    """Read an Instella's config.json without torch; None for a hub id, a folder that is not there yet, or another."""
    folder = Path(spec).expanduser()
    path = (folder / "model" if is_run(folder) else folder) / "config.json"
    if not path.is_file():
        return None
    told: Mapping[str, Any] = read_json(path)
    if told.get("model_type") != "instella":
        return None
    rope = told.get("rope_parameters") or told
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return Outline(
        dimensions=Dimensions(**{name: told[name] for name in names}, num_key_value_heads=told["num_key_value_heads"]),
        theta=rope["rope_theta"],
        length=told["max_position_embeddings"],
    )
