"""Models and budgets as users name them: a folder or hub id that runs in this process, or a name behind an endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.config import digest
from luthier.core.errors import ConfigError, require
from luthier.core.files import read_json, sha256_file

if TYPE_CHECKING:
    from luthier.llm.local import LocalModel
    from luthier.llm.types import StreamingBackend

BUDGETS = {"calls": "max_calls", "tokens": "max_tokens_total", "seconds": "max_seconds", "dollars": "max_cost"}


def open_model(
    name: str, *, endpoint: str | None = None, device: str = "auto", concurrency: int = 32
) -> StreamingBackend:
    """The model behind an endpoint, or in this process where there is none. `concurrency`: most calls in flight."""
    if endpoint is None:
        return open_local(name, device=device)
    from luthier.llm.connections import collect_rarely
    from luthier.llm.endpoint import Endpoint

    collect_rarely()
    return Endpoint(endpoint, name, concurrency=concurrency)


def open_local(name: str, *, device: str = "auto") -> LocalModel:
    """Load a model folder or hub id with its tokenizer."""
    require("torch", "torch")
    from luthier.data.tokenizer import load_tokenizer
    from luthier.learn.parallel import choose_device
    from luthier.llm.local import LocalModel
    from luthier.models.load import load_pretrained

    network = load_pretrained(name, device=choose_device(device))
    return LocalModel(network, load_tokenizer(name), name=name)


def identity(name: str, *, endpoint: str | None = None) -> str:
    """A name that changes with the weights, the settings and the tokenizer of a model folder, so that results of a
    folder that is trained again are told from earlier ones; of a server or a hub id, just the name."""
    folder = Path(name)
    if endpoint is not None or not folder.is_dir():
        return name
    made = folder / "luthier.json"
    weights = read_json(made).get("weights") if made.exists() else None
    if not weights:
        weights = {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}
    settings = [sha256_file(file) for file in (folder / "config.json", folder / "tokenizer.json") if file.exists()]
    return f"{name}@{digest([weights, settings])[:16]}"


def open_role(text: str) -> tuple[str, StreamingBackend]:
    """'judge=NAME@URL' (or 'judge=FOLDER') as the role and its model. Raises: ConfigError."""
    role, equals, model = text.partition("=")
    if not equals or not model:
        raise ConfigError(
            f"role: got {text!r}, expected ROLE=MODEL or ROLE=MODEL@URL", hint="judge=qwen@http://host/v1"
        )
    name, at, url = model.rpartition("@")
    return (role, open_model(name, endpoint=url)) if at and "://" in url else (role, open_model(model))


def read_budget(texts: Iterable[str]) -> dict[str, Any]:
    """Limits such as calls=40 as settings of `ReasonConfig`. Raises: ConfigError naming what is wrong."""
    limits: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in BUDGETS or not equals:
            raise ConfigError(f"budget: got {text!r}, expected {', '.join(BUDGETS)}=NUMBER", hint="--budget calls=40")
        try:
            limits[BUDGETS[name]] = int(value) if name in ("calls", "tokens") else float(value)
        except ValueError as error:
            raise ConfigError(f"budget: {value!r} is no number", hint=f"for example {name}=40") from error
    return limits
