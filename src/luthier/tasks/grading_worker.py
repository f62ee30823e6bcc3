"""Symbolic comparison of two answers, in a process that may be killed: JSON lines in, JSON lines out.

Algebra on what a model wrote can take any time and memory, so it happens here, under a memory limit, and whoever asks
keeps the clock. The process ends when its input does, so it never outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys


def main() -> None:
    """Answer {"gold": ..., "answer": ...} with {"same": true, false or null}; null: one of them is not mathematics."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory(int(sys.argv[1]))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = (LatexExtractionConfig(), ExprExtractionConfig())

    def read(text: str) -> list[object]:
        inside = text.strip().strip("$")
        return parse(f"${inside}$", kinds, parsing_timeout=None, raise_on_error=False) or parse(
            inside, kinds, parsing_timeout=None, raise_on_error=False
        )

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            gold, answer = read(asked["gold"]), read(asked["answer"])
            # The order matters to math-verify: gold first.
            same = bool(verify(gold, answer, timeout_seconds=None)) if gold and answer else None
        except (Exception, RecursionError, MemoryError):
            same = None
        print(json.dumps({"same": same}), flush=True)


def _limit_memory(mebibytes: int) -> None:
    with contextlib.suppress(ImportError):  # no such limits on Windows
        import resource

        limit = mebibytes << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
