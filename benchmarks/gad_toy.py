"""GAD on ten classes, from 18 starts and with discriminators of four speeds: where the student ends (Fig. 5, §8.2).

    python benchmarks/gad_toy.py [--seeds 0 1] [--steps 1500] [--record]

Printed beside: the best reverse KL that any student can have, and the student that SeqKD ends with. A row per setting
and seed goes to results/ with --record.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from record import record

from luthier.distill.toy import ToyResult, ToySettings, best_student, train_toy

NARROW = [(mean, width) for mean in (1.0, 2.0, 3.0, 6.0, 7.0, 8.0) for width in (0.5, 1.0)]
WIDE = [(4.5, 1.0), (2.0, 3.0), (4.5, 3.0), (7.0, 3.0), (4.5, 6.0)]
SETTINGS = {
    "D 10 times as fast": ToySettings(discriminator_rate=0.1),
    "D twice as fast": ToySettings(discriminator_rate=0.02),
    "D a quarter as fast": ToySettings(discriminator_rate=0.0025),
    "D frozen": ToySettings(frozen=True),
}


def summary(result: ToyResult, oracle: float) -> dict[str, Any]:
    """What became of the starts: counts, and the reverse KL of each."""
    near, other = result.reverse_kl < oracle + 0.03, (result.reverse_kl - 0.92).abs() < 0.03
    return {
        "reverse_kl": [round(float(value), 3) for value in result.reverse_kl],
        "within_0.03_of_best": int(near.sum()),
        "at_the_smaller_mode": int((other & (result.mean > 6) & (result.width < 1)).sum()),
        "wide": int((result.width > 2.5).sum()),
        "point_mass": int((result.peak > 0.95).sum()),
    }


def table(starts: list[tuple[float, float]], result: ToyResult) -> None:
    """One line per start."""
    print("  mean width ->  mean  width  RKL    FKL    valley peak")
    for row, (mean, width) in enumerate(starts):
        fields = (result.mean, result.width, result.reverse_kl, result.forward_kl, result.valley, result.peak)
        ended = "  ".join(f"{float(values[row]):5.2f}" for values in fields)
        print(f"  {mean:4.1f} {width:5.1f} -> {ended}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--record", action="store_true", help="append rows to results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    best, seqkd = best_student(reverse=True), best_student(reverse=False)
    starts = [*NARROW, *WIDE, (seqkd[0], seqkd[1])]
    print("best student (mean, width, reverse KL):", *(f"{value:.3f}" for value in best))
    print("SeqKD's student (mean, width, forward KL):", *(f"{value:.3f}" for value in seqkd))
    for name, settings in SETTINGS.items():
        for seed in options.seeds:
            result = train_toy(starts, replace(settings, seed=seed, steps=options.steps))
            print(f"\n{name}, seed {seed}")
            table(starts, result)
            told = {
                "setting": name,
                "seed": seed,
                "steps": options.steps,
                "starts": len(starts),
                **summary(result, best[2]),
            }
            if options.record:
                record("gad_toy", best_reverse_kl=round(best[2], 3), **told)
            else:
                print(" ", {key: value for key, value in told.items() if key != "reverse_kl"})


if __name__ == "__main__":
    main()
