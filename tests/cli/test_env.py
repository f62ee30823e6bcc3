from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from typing import Any

from luthier.cli.env import EnvConfig, run
from luthier.core.console import Console


def test_prints_versions_machine_and_devices() -> None:
    out = io.StringIO()
    run(EnvConfig(), Console(out=out))
    lines = {line.split()[0]: line.split(maxsplit=1)[-1] for line in out.getvalue().splitlines()[1:]}
    assert int(lines["cores"]) == os.cpu_count()
    assert {"python", "luthier", "torch", "devices"} <= set(lines)


def test_works_without_torch(luthier_without_torch: Callable[..., Any]) -> None:
    outcome = luthier_without_torch("env", "--json")
    assert outcome.code == 0, outcome.err
    assert "devices" not in json.loads(outcome.out)
