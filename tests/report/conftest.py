from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.files import write_json
from luthier.core.run import RunFolder

STARTED = {"started": "2026-09-21 14:13 UTC", "command": "luthier pretrain --size nano"}  # so that copies are the same
HOSTILE = '<script>alert("1")</script> & <b>'
SUMMARY = {
    "verb": "pretrain",
    "headline": {"held-out bits per byte": "2.05 [1.98, 2.12]", "tokens": "2.4 M"},
    "tables": [
        {"title": "By source", "columns": ["source", "documents", "bits per byte"], "rows": [["prose", 1200, 2.051]]}
    ],
}


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Writes a run folder with so many train rows, an evaluation every ten of them, and finished or not."""

    def make(
        path: Path, *, rows: int = 100, evals: bool = True, finished: bool = True, learning_rate: float = 1e-3
    ) -> Path:
        run = RunFolder.open(
            path, {"model": "instella-8m", "steps": rows, "optimizer": {"learning_rate": learning_rate}}
        )
        for step in range(1, rows + 1):
            loss, where = 3 + 5 * math.exp(-step / 10), {"step": step, "tokens": step * 4096, "seconds": step * 0.5}
            speed = {"tokens_per_second": 9000.0 + step % 7, "mfu": 0.31}
            run.log("train", **where, loss=loss, learning_rate=learning_rate, grad_norm=1 + 1 / step, **speed)
            if evals and step % 10 == 0:
                bits = loss / 2
                run.log("eval", **where, loss=loss, bits_per_byte=bits, low=bits - 0.1, high=bits + 0.1, documents=130)
                run.write_sample(step, [{"prompt": "The return", "text": f" statement at {step}. {HOSTILE}"}])
        if finished:
            run.write_summary(SUMMARY)
        run.close()
        write_json(path / "env.json", {**run.env, **STARTED})
        return path

    return make
