from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tyro

from luthier.cli import chat
from luthier.cli.chat import ChatConfig, Conversation, _only_pretrained, converse, run
from luthier.core.console import Console
from luthier.core.errors import CheckpointError, ConfigError
from luthier.llm import RequestFailed, ScriptedBackend


@contextlib.contextmanager
def streaming_server(*, endless: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that echoes the last message word by word; or says the same word for ever. Yields URL and bodies."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            body = bodies[-1]
            text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for word in f"you said {text}".split(" "):
                    self._send({"content": word + " "}, None)
                while endless:
                    time.sleep(0.01)
                    self._send({"content": "again "}, None)
                self._send({"content": ""}, "stop")

        def _send(self, delta: dict[str, str], finish: str | None) -> None:
            event = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def console(*, as_json: bool = False) -> Console:
    return Console(out=io.StringIO(), err=io.StringIO(), as_json=as_json)


def written(console: Console) -> tuple[str, str]:
    assert isinstance(console.out, io.StringIO)
    assert isinstance(console.err, io.StringIO)
    return console.out.getvalue(), console.err.getvalue()


def test_model_is_positional() -> None:
    config = tyro.cli(ChatConfig, args=["some/model", "--endpoint", "http://x/v1", "--prompt", "hi", "--raw"])
    assert config == ChatConfig(model="some/model", endpoint="http://x/v1", prompt="hi", raw=True)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="both --raw and --chat"):
        ChatConfig(model="m", raw=True, chat=True)
    with pytest.raises(ConfigError, match="--system"):
        ChatConfig(model="m", raw=True, system="x")


# --- one message -----------------------------------------------------------------------------------------------------


def test_prompt_prints_only_the_reply() -> None:
    screen = console()
    with streaming_server() as (url, bodies):
        run(ChatConfig(model="m", endpoint=url, prompt="hello", system="Be kind.", max_tokens=5, seed=3), screen)
    assert written(screen) == ("you said hello \n", "")
    assert bodies[0]["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"], bodies[0]["seed"]) == (5, 0.7, 3)


def test_a_pipe_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    screen = console()
    with streaming_server() as (url, bodies):
        run(ChatConfig(model="m", endpoint=url), screen)
    assert bodies[0]["messages"] == [{"role": "user", "content": "two\nlines"}]
    assert written(screen)[1] == ""


def test_an_empty_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match="empty") as caught:
        run(ChatConfig(model="m", endpoint="http://x"), console())
    assert "--prompt" in caught.value.hint


def test_json_holds_the_reply() -> None:
    screen = console(as_json=True)
    with streaming_server() as (url, _):
        run(ChatConfig(model="m", endpoint=url, prompt="hello"), screen)
    assert json.loads(written(screen)[0]) == {"model": "m", "reply": "you said hello ", "raw": False}


def test_raw_sends_the_text_as_it_is_and_limits_its_length() -> None:
    with streaming_server() as (url, bodies):
        run(ChatConfig(model="m", endpoint=url, prompt="once upon", raw=True), console())
    assert (bodies[0]["prompt"], bodies[0]["max_tokens"]) == ("once upon", 256)


def test_a_failing_server_is_an_error_not_an_empty_reply() -> None:
    with pytest.raises(RequestFailed, match="cannot be reached"):
        run(ChatConfig(model="m", endpoint="http://127.0.0.1:9/v1", prompt="hello"), console())


# --- conversation ----------------------------------------------------------------------------------------------------


def talk(backend: ScriptedBackend, *lines: str | type[BaseException], raw: bool = False) -> tuple[str, str]:
    """Type lines (or Ctrl-C and Ctrl-D as exceptions) and return what was written."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    screen = console()
    with asyncio.Runner() as runner:
        converse(Conversation(ChatConfig(model="m"), backend, raw=raw), runner, screen, read)
    return written(screen)


def test_turns_are_remembered_until_reset() -> None:
    backend = ScriptedBackend(["Hi Ann.", "Ann.", "Who?"])
    out, _ = talk(backend, "I am Ann", "  ", "Who am I?", "/reset", "Who am I?", EOFError)
    assert out == "Hi Ann.\nAnn.\nWho?\n\n"
    assert [len(request.messages) for request in backend.requests] == [1, 3, 1]
    assert backend.requests[1].messages[1] == {"role": "assistant", "content": "Hi Ann."}


def test_commands() -> None:
    backend = ScriptedBackend(["ok", "ok"])
    _, err = talk(backend, "/system Be brief.", "hi", "/system", "hi", "/nonsense", KeyboardInterrupt, "/exit")
    assert backend.requests[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert all(message["role"] != "system" for message in backend.requests[1].messages)
    assert err.count(chat.HELP) == 2


def test_an_error_ends_the_turn_and_not_the_conversation() -> None:
    backend = ScriptedBackend([RequestFailed("server is down", hint="start it"), "back"])
    out, err = talk(backend, "hi", "hi", EOFError)
    assert "server is down\nstart it" in err
    assert out == "\nback\n\n"
    assert len(backend.requests[1].messages) == 1, "the failed turn is not part of the conversation"


def test_raw_conversation_has_no_memory() -> None:
    backend = ScriptedBackend(["a time", "a dog"])
    talk(backend, "once upon", "the", EOFError, raw=True)
    assert [request.prompt for request in backend.requests] == ["once upon", "the"]


TERMINAL = """
import sys
from luthier.cli.chat import ChatConfig, run
from luthier.core.console import Console
run(ChatConfig(model="m", endpoint=sys.argv[1]), Console())
"""


def test_control_c_stops_the_reply_and_control_d_leaves() -> None:
    with streaming_server(endless=True) as (url, bodies):
        terminal, inside = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
        # A session of its own, so that Ctrl-C of this terminal reaches the child and nobody else.
        child = subprocess.Popen(
            [sys.executable, "-c", "import os, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + TERMINAL, url],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env=environment,
        )
        os.close(inside)
        screen = ""

        def until(text: str) -> None:
            nonlocal screen
            while text not in screen:
                screen += os.read(terminal, 4096).decode()
            screen = screen.split(text, 1)[1]

        try:
            until("you> ")
            os.write(terminal, b"hello\n")
            until("you said hello again")
            os.write(terminal, b"\x03")
            until("[stopped]")
            until("you> ")
            os.write(terminal, b"more\n")
            until("you said more again")
            os.write(terminal, b"\x03")
            until("you> ")
            os.write(terminal, b"\x04")
            assert child.wait(10) == 0
        finally:
            child.kill()
            child.wait()
            os.close(terminal)
    assert [message["content"] for message in bodies[1]["messages"]][0::2] == ["hello", "more"]
    assert bodies[1]["messages"][1]["content"].startswith("you said hello again")


# --- a model in this process -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models that say how they were made: `pretrain` and `sft`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.data.tokenizer import train_bpe
    from luthier.models.load import save_pretrained

    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["hello world "], 262)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=262, max_position_embeddings=64, **shape))
    for verb in ("pretrain", "sft"):
        save_pretrained(network, tokenizer, root / verb, {"verb": verb})
    return root


def test_a_base_model_continues_text_unless_told_otherwise(folders: Path) -> None:
    def ask(model: str, **options: Any) -> tuple[dict[str, Any], str]:
        screen = console(as_json=True)
        run(ChatConfig(model=str(folders / model), prompt="hello", seed=1, device="cpu", **options), screen)
        out, err = written(screen)
        return json.loads(out), err

    base, said = ask("pretrain")
    assert base["raw"] is True
    assert base["reply"]
    assert "only pretrained" in said
    assert "--chat" in said
    assert ask("pretrain", raw=True) == (base, "")
    assert ask("pretrain", chat=True)[0]["raw"] is False
    tuned, said = ask("sft", max_tokens=5)
    assert (tuned["raw"], said) == (False, "")


def test_system_for_a_base_model_is_an_error(folders: Path) -> None:
    with pytest.raises(ConfigError, match="base model"):
        run(ChatConfig(model=str(folders / "pretrain"), prompt="x", system="y", device="cpu"), console())


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        run(ChatConfig(model=str(tmp_path / "nothing"), prompt="x", device="cpu"), console())


@pytest.mark.parametrize("verb", ["pretrain", "soup", "extend"])
def test_what_was_trained_on_text_alone_has_not_chatted(verb: str) -> None:
    assert _only_pretrained({"verb": verb, "chat": False})
    assert not _only_pretrained({"verb": verb, "chat": True})
    assert _only_pretrained({"verb": "quantize", "parents": [{"verb": verb, "chat": False}]})
    assert not _only_pretrained({"verb": "sft", "chat": True})
    assert not _only_pretrained({})
