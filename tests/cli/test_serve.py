from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx


def test_what_to_serve_must_be_said_once(luthier: Callable[..., Any]) -> None:
    assert luthier("serve").error == "got neither a model nor --upstream"
    assert luthier("serve", "m", "--upstream", "http://x").error == "got both a model and --upstream"


def test_a_taken_port_is_said(luthier: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = luthier("serve", "--upstream", "http://127.0.0.1:9/v1", "--port", port)
    assert f"127.0.0.1:{port} cannot be listened on" in outcome.error


def test_it_serves_until_interrupted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "luthier", "serve", "--upstream", "http://127.0.0.1:9/v1", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
            break
        except httpx.TransportError:
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert said.strip().endswith("stopped")
