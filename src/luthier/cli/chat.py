"""`luthier chat`: talk to a model, in this process or behind an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from luthier.cli.models import open_local as open_local_model
from luthier.core.console import Console
from luthier.core.errors import ConfigError, UserError
from luthier.llm.types import Message, Request, StreamingBackend

if TYPE_CHECKING:
    from luthier.llm.local import LocalModel

RAW_TOKENS = 256  # length of a raw continuation: base models seldom stop by themselves
HELP = "/system TEXT sets the system message, /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a model: a conversation on a terminal; in a pipe, standard input is one message."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id; with --endpoint, the model's name on that server."""

    endpoint: str | None = None
    """URL of an OpenAI-compatible server (OPENAI_API_KEY is used if set); by default the model runs in this process."""

    prompt: str | None = None
    """Ask this one thing, print the reply and leave."""

    system: str | None = None
    """System message."""

    raw: bool = False
    """Continue the text as it is, without chat format. The default for models that were only pretrained."""

    chat: bool = False
    """Use the chat format even for a model that was only pretrained."""

    max_tokens: int | None = None
    """Longest reply in tokens; by default until the model stops (raw: 256)."""

    temperature: float = 0.7
    """0 always takes the most likely token."""

    top_p: float = 0.95
    """Sample from the smallest set of tokens with this probability."""

    seed: int | None = None
    """The same seed and conversation give the same replies."""

    device: str = "auto"
    """Where a model in this process runs: cpu, cuda, ...; auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        if self.raw and self.chat:
            raise ConfigError("got both --raw and --chat", hint="give one of them")
        if self.raw and self.system is not None:
            raise ConfigError("--system needs the chat format, got --raw", hint="put the text into the prompt")


def run(config: ChatConfig, console: Console) -> None:
    """Open the model and talk: one message (--prompt, or a pipe) or a conversation."""
    interactive = config.prompt is None and sys.stdin.isatty() and console.out.isatty()
    text = None if interactive else _only_message(config)
    backend, raw = open_backend(config, console)
    with asyncio.Runner() as runner:
        conversation = Conversation(config, backend, raw=raw)
        try:
            if text is None:
                converse(conversation, runner, console)
            else:
                reply = runner.run(conversation.answer(text, _writer(console)))
                console.print()
                console.result({"model": config.model, "reply": reply, "raw": raw})
        finally:
            runner.run(backend.aclose())


class Conversation:
    """What was said so far, and how to ask for more."""

    def __init__(self, config: ChatConfig, backend: StreamingBackend, *, raw: bool) -> None:
        self.config, self.backend, self.raw = config, backend, raw
        self.system = config.system
        self.turns: list[Message] = []

    def request(self, text: str) -> Request:
        """The request that continues the conversation with `text`, or the text itself when raw."""
        config = self.config
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
        if self.raw:
            max_tokens = config.max_tokens or self._raw_tokens(text)
            return Request(prompt=text, max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
        head: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*head, *self.turns, {"role": "user", "content": text}]
        return Request(messages=messages, max_tokens=config.max_tokens, **sampling)  # type: ignore[arg-type]

    async def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Stream the reply to `show` and remember the turn; of an interrupted reply, what was shown."""
        pieces: list[str] = []
        try:
            async with contextlib.aclosing(self.backend.stream(self.request(text))) as stream:  # type: ignore[type-var]
                async for piece in stream:
                    pieces.append(piece)
                    show(piece)
        finally:
            reply = "".join(pieces)
            if reply and not self.raw:
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return reply

    def _raw_tokens(self, text: str) -> int:
        room = getattr(self.backend, "room", lambda request: None)(Request(prompt=text))
        return RAW_TOKENS if room is None else max(1, min(RAW_TOKENS, room))


def converse(
    conversation: Conversation, runner: asyncio.Runner, console: Console, read: Callable[[str], str] = input
) -> None:
    """Read and answer until the user leaves. Errors end a turn, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input(), where the platform has it
    console.status(HELP)
    while True:
        try:
            text = read("text> " if conversation.raw else "you> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if text.startswith("/"):
            if not _command(conversation, text, console):
                return
        elif text.strip():
            _turn(conversation, runner, text, console)


def _turn(conversation: Conversation, runner: asyncio.Runner, text: str, console: Console) -> None:
    try:
        runner.run(conversation.answer(text, _writer(console)))
    except KeyboardInterrupt:
        console.status(" [stopped]")
    except UserError as error:
        console.status(f"{error}\n{error.hint}")
    console.print()


def _command(conversation: Conversation, text: str, console: Console) -> bool:
    """Obey a line that starts with a slash; False to leave."""
    name, _, rest = text.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/reset":
        conversation.turns.clear()
        console.status("conversation forgotten")
    elif name == "/system" and not conversation.raw:
        conversation.system = rest.strip() or None
        console.status(f"system message: {conversation.system or 'none'}")
    else:
        console.status(HELP)
    return True


def open_backend(config: ChatConfig, console: Console) -> tuple[StreamingBackend, bool]:
    """The model to talk to, and whether it continues raw text."""
    if config.endpoint is None:
        return open_local(config, console)
    from luthier.llm.endpoint import Endpoint

    return Endpoint(config.endpoint, config.model), config.raw


def open_local(config: ChatConfig, console: Console) -> tuple[LocalModel, bool]:
    """Load the model; a model that was only pretrained, or has no chat template, continues raw text by default."""
    model = open_local_model(config.model, device=config.device)
    raw = config.raw
    if not config.chat and not raw:
        from luthier.models.load import read_provenance

        pretrained = _only_pretrained(read_provenance(Path(config.model)))
        raw = pretrained or not model.has_chat_template
        if raw and config.system is not None:
            raise ConfigError(f"{config.model} is a base model: --system means nothing to it", hint="add --chat")
        if raw:
            why = "was only pretrained" if pretrained else "has no chat template"
            console.status(f"{config.model} {why}: it continues your text (--chat for the chat format)")
    return model, raw


def _only_pretrained(provenance: Mapping[str, Any]) -> bool:
    """Whether a model has seen no conversation: trained on text alone, or the quantized version of such a one."""
    made = provenance.get("parents", []) if provenance.get("verb") == "quantize" else [provenance]
    return any(model.get("verb") in ("pretrain", "soup", "extend") and not model.get("chat") for model in made)


def _only_message(config: ChatConfig) -> str:
    text = sys.stdin.read().removesuffix("\n") if config.prompt is None else config.prompt
    if not text.strip() and not config.raw:
        raise ConfigError(
            "there is nothing to answer: the message is empty", hint="give --prompt TEXT, or pipe text in"
        )
    return text


def _writer(console: Console) -> Callable[[str], None]:
    """Shows pieces of a reply as they come; with --json the reply is part of the result instead."""

    def write(piece: str) -> None:
        if not console.as_json:
            console.out.write(piece)
            console.out.flush()

    return write
