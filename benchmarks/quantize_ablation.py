"""What each part of the method is worth: rounds, scales, angles, samples, and the angles' gradient.

    python benchmarks/quantize_ablation.py [--model FOLDER --data CALIBRATION --test TEXT] [--seeds 0 1 2] [--bits 4]

Every arm is the preset `quick` with one thing changed. KL to the original model, 95 % intervals over documents after
averaging over seeds, and its ratio to the first arm, paired by document.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quantize_quality import TOUR, Outcome, documents_of, mean_kl, run_arm, settings
from record import record

from luthier.core.stats import bootstrap_ratio
from luthier.data.tokenizer import load_tokenizer
from luthier.models.load import load_pretrained

PUBLISHED = {"scale_parameter": "linear", "scale_start": "ones", "guard": False, "warmup": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "quick (K = 8)": {},
    "K = 4": {"rounds": 4},
    "K = 2": {"rounds": 2},
    "K = 1": {"rounds": 1},
    "K = 0, scales only": {"rounds": 0},
    "angles only": {"scale_parameter": "none", "scale_start": "ones"},
    "neither": {"rounds": 0, "scale_parameter": "none", "scale_start": "ones"},
    "random pairs": {"pairing": "random"},
    "not shared": {"share": False},
    "scales start at 1": {"scale_start": "ones"},
    "stage 2 from rounding": {"start": "rtn"},
    "16 windows": {"samples": 16},
    "128 windows": {"samples": 128},
    "stage 1 alone": {"start": "rtn", "epochs": (4, 0)},
    # The gradient in a stage 1 like the published one: no search, no guard, no warm-up.
    "published stage 1, exact": {**PUBLISHED, "start": "rtn", "epochs": (4, 0)},
    "published stage 1, reference gradient": {**PUBLISHED, "start": "rtn", "epochs": (4, 0), "gradient": "reference"},
    "the same, then stage 2, exact": {**PUBLISHED, "start": "rtn"},
    "the same, then stage 2, reference gradient": {**PUBLISHED, "start": "rtn", "gradient": "reference"},
}


def main() -> None:
    """Run the arms and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOUR / "model")
    parser.add_argument("--data", default=str(TOUR / "data" / "train-0"))
    parser.add_argument("--test", default=str(TOUR / "data" / "held-out"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--validation-samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    options.paper_samples, options.paper_epochs, options.skip = options.samples, None, []

    tokenizer, model = load_tokenizer(str(options.model)), load_pretrained(options.model, dtype=torch.float32)
    test = documents_of(options.test, tokenizer, options.pieces)
    found = dict[str, list[Outcome]]()
    for arm in options.arms:
        for seed in options.seeds:
            config = replace(settings(options, "quick", options.bits, seed), **ARMS[arm])
            found.setdefault(arm, []).append(run_arm(options.model, model, test, config))
        kl = [round(outcome.comparison.kl.value, 5) for outcome in found[arm]]
        print(f"{arm}: KL {kl}, {found[arm][0].seconds:.0f} s", flush=True)
    rows, base = [], mean_kl(found[options.arms[0]])
    for arm, outcomes in found.items():
        tokens = [float(count) for count in outcomes[0].comparison.document_tokens]
        values = [outcome.comparison.kl.value for outcome in outcomes]
        rows.append(
            {
                "arm": arm,
                "kl": bootstrap_ratio(mean_kl(outcomes), tokens).text(5),
                "kl_of_seeds": f"{min(values):.5f} to {max(values):.5f}",
                "vs_first": bootstrap_ratio(mean_kl(outcomes), base).text(3),
                "bits": round(outcomes[0].bits + outcomes[0].metadata_bits, 3),
                "seconds": round(outcomes[0].seconds, 1),
            }
        )
    record(
        "quantize_ablation",
        model="/".join(options.model.resolve().parts[-2:]),
        bits=options.bits,
        group_size=options.group_size,
        samples=options.samples,
        length=options.length,
        seeds=options.seeds,
        documents=len(test),
        rows=rows,
    )


if __name__ == "__main__":
    main()
