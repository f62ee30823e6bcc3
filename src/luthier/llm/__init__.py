"""Talking to any language model through one small async protocol.

Read in this order: `types` (requests, completions, the `Backend` protocol), `endpoint` with `dialect`, `replies`,
`retry` and `connections` (any OpenAI-compatible server), `local` with `generation` and `sampling` (a transformers
model in this process; the only part that needs torch), `cache` (replies are paid for once), `scripted` (a fake for
tests), `prices` (tokens to dollars), `budget` (a limit that is never passed), `stub_server` (a server around a
function, with faults on demand).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.llm.types import (
    Backend,
    Completion,
    Message,
    Request,
    RequestFailed,
    Score,
    StreamingBackend,
    TokenLogprob,
    Usage,
    json_schema,
    request_key,
)

if TYPE_CHECKING:
    from luthier.llm.cache import CachedBackend
    from luthier.llm.endpoint import Endpoint
    from luthier.llm.local import LocalModel
    from luthier.llm.scripted import ScriptedBackend

# Loaded on first use: aiohttp, sqlite and above all torch cost start-up time.
_LAZY = {
    "CachedBackend": "luthier.llm.cache",
    "Endpoint": "luthier.llm.endpoint",
    "LocalModel": "luthier.llm.local",
    "ScriptedBackend": "luthier.llm.scripted",
}

__all__ = [
    "Backend",
    "CachedBackend",
    "Completion",
    "Endpoint",
    "LocalModel",
    "Message",
    "Request",
    "RequestFailed",
    "Score",
    "ScriptedBackend",
    "StreamingBackend",
    "TokenLogprob",
    "Usage",
    "json_schema",
    "request_key",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
