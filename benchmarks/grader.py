"""The grader against strings that mean harm: 10,000 answers through extraction, exact comparison and algebra.

    python benchmarks/grader.py [--strings 10000]

Every string goes the whole way, worker processes included. Each may try to run code; a file that only executed code
could write tells. Counted: verdicts, comparisons that took too long, strings a second, and harmless pairs a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

from record import record

from luthier.tasks.answers import extract_answer
from luthier.tasks.grading import Grader
from luthier.tasks.task import Problem

MATHS = r"<answer> </answer> \boxed{ } { \frac \sqrt $ ( ) ^ _ ! = / - + * . , % 1 2 x y \pi \int \sum \binom & \\"
TRAPS = r"\begin{matrix} \begin{cases} \lim_{x\to0} \sin \text{ 1e999999 9^9^9^9 lambda:0 ` ∞ [1,2) {1,2} 12!!!!!"
ODD = ["10^{10^{10}}", "2^{2^{2^{2^{2^2}}}}", "\x00", "\ud800", "\u202e", "0" * 50, "(" * 40, "\n"]
PIECES = [*MATHS.split(), *TRAPS.split(), *ODD]
HARMLESS = [("\\frac{1}{2}x", "x/2"), ("\\sqrt{8}", "2\\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"), ("\\{1,2\\}", "\\{2,1\\}")]
GOLDS = ["x^2+1", "\\frac{\\pi}{3}", "\\sqrt{2}", "(1, 2)", "7"]


def hostile(rng: random.Random, canary: Path) -> str:
    """A string of pieces, now and then with code that would write a file."""
    code = f"__import__('os').system('touch {canary}')"
    pieces = rng.choices([*PIECES, code, f"exec(\"open('{canary}','w')\")"], k=rng.randrange(1, 25))
    text = "".join(pieces)
    return f"<answer>{text}</answer>" if rng.random() < 0.5 else text


async def run(strings: int, seed: int) -> dict[str, object]:
    """Grade all; what came of it."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "executed"
        texts = [hostile(rng, canary) for _ in range(strings)]
        verdicts: Counter[str] = Counter()
        async with Grader(workers=2, deadline=2.0) as grader:
            await grader.equivalent("x+1", "1+x")  # the workers are there
            began = time.perf_counter()

            async def grade(number: int, text: str) -> None:
                problem = Problem(id=str(number), prompt="", answer=GOLDS[number % len(GOLDS)])
                verdicts[(await grader.grade(extract_answer(text) or text, problem)).status] += 1

            slots = asyncio.Semaphore(8)

            async def one(number: int, text: str) -> None:
                async with slots:
                    await grade(number, text)

            await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))
            took = time.perf_counter() - began
            began = time.perf_counter()
            pairs = [(a + " " * (n % 7), b + " " * (n // 7)) for n in range(50) for a, b in HARMLESS]
            same = [await grader.equivalent(a, b) for a, b in pairs]
            harmless = time.perf_counter() - began
        return {
            "strings": strings,
            "verdicts": dict(verdicts),
            "executed": canary.exists(),
            "seconds": round(took, 1),
            "strings_per_second": round(strings / took, 1),
            "harmless_right": sum(value is True for value in same) / len(same),
            "harmless_pairs_per_second": round(len(pairs) / harmless, 1),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    options = parser.parse_args()
    result = asyncio.run(run(options.strings, options.seed))
    if options.dry:
        print(result)
    else:
        record("grader", **result)


if __name__ == "__main__":
    main()
