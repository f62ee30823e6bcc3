"""`luthier serve`: an OpenAI-compatible server in front of another, whose models reason."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from luthier.cli.models import read_budget
from luthier.core.console import Console
from luthier.core.errors import ConfigError, require

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve every method as a model: ssr/NAME, ssr-plan:rounds=5/NAME, maj@16/NAME; plain names pass through."""

    model: tyro.conf.Positional[str] = ""
    """Model folder or hub id that runs in this process; leave it out with --upstream."""
    upstream: str = ""
    """URL of the OpenAI-compatible server that has the models."""
    api_key_env: str = KEY_VARIABLE
    """Environment variable with the upstream server's key, for clients that send none."""
    model_name: str = ""
    """Name under which a model in this process is served; by default that of its folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8100
    """Port to listen on; 0 takes a free one."""
    tools: Literal["refuse", "pass"] = "refuse"
    """Requests with tools to a reasoner: an error, or an answer of the plain model."""
    budget: tuple[str, ...] = ()
    """Limits of every request: calls=40, tokens=20000, seconds=60. When one is reached, the answer so far counts."""
    concurrency: int = 64
    """Most calls in flight to the upstream server."""
    timeout: float = 600.0
    """Seconds without a byte from the upstream server before a call fails."""
    traces: Path | None = None
    """Append everything that happens to this .jsonl file."""
    prices: Path | None = None
    """YAML file with dollars per million tokens: NAME: {input: 0.05, output: 0.2}."""
    device: str = "auto"
    """Where a model in this process runs: cpu, cuda, ...; auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.upstream):
            raise ConfigError(
                f"got {'both a model and --upstream' if self.model else 'neither a model nor --upstream'}",
                hint="luthier serve --upstream http://localhost:8000/v1, or luthier serve FOLDER",
            )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: got {self.port}, expected 0 to 65535", hint="8100 is the default")
        if self.api_key_env != KEY_VARIABLE and not os.environ.get(self.api_key_env):
            raise ConfigError(
                f"api_key_env: the environment has no {self.api_key_env}", hint="export it, or name another"
            )


def run(config: ServeConfig, console: Console) -> None:
    """Serve until Ctrl-C."""
    uvicorn = require("uvicorn", "serve")
    require("fastapi", "serve")
    from luthier.llm.connections import collect_rarely
    from luthier.llm.prices import Prices
    from luthier.reason.trace import TraceFile
    from luthier.serve.app import Settings, create_app

    limits = read_budget(config.budget)
    if "max_cost" in limits and not config.prices:
        raise ConfigError("budget: dollars need prices", hint="add --prices FILE, or limit tokens instead")
    with contextlib.ExitStack() as stack:
        listeners: tuple[Any, ...] = ()
        if config.traces:
            listeners = (stack.enter_context(contextlib.closing(TraceFile(config.traces))),)
        price = Prices.read(config.prices).cost if config.prices else None
        listening = stack.enter_context(_listen(config))
        collect_rarely()
        options = Settings(tools=config.tools, price=price, listeners=listeners, limits=limits)
        app = create_app(_upstream(config), options)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        where = f"http://{config.host}:{listening.getsockname()[1]}/v1"
        console.status(f"serving {config.model or config.upstream} at {where}; models are METHOD/NAME; Ctrl-C stops")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])
        console.status("stopped")


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error})",
            hint="choose another --port; 0 takes a free one",
        ) from error
    # asyncio does this for the sockets it opens itself. Without it every answer waits 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _upstream(config: ServeConfig) -> Any:
    from luthier.serve.in_process import Local
    from luthier.serve.protocol import split_model
    from luthier.serve.upstream import Server

    if config.upstream:
        key = os.environ.get(config.api_key_env)
        return Server(config.upstream, key=key, concurrency=config.concurrency, timeout=config.timeout)
    from luthier.cli.models import open_local

    name = config.model_name or Path(config.model).name
    if split_model(name)[0]:
        raise ConfigError(f"model_name: {name!r} begins with a method", hint="choose another name")
    return Local(open_local(config.model, device=config.device), name)
