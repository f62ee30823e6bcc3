"""Quality of quantization at equal bits: KL to the original model of every method on the same text.

    python benchmarks/quantize_quality.py [--model FOLDER --data CALIBRATION --test TEXT] [--bits 4 3] [--seeds 0 1 2]
                                          [--methods rtn awq gptq rotated-gptq quick paper] [--group-size 32]

Without options: the model of `make run`, calibrated on its training text and compared on its held-out text. All methods
run on the same quantizer, so codes, step sizes and zero points take the same room; the transforms of rotated methods
come on top and are counted in their own column. Intervals are 95 %, over documents; ratios are paired by document. For
several seeds the divergences of a document are averaged before that, and their range is shown.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from transformers import PreTrainedModel

from luthier.cli.texts import open_text
from luthier.core.config import build
from luthier.core.console import Console
from luthier.core.stats import bootstrap_ratio
from luthier.data.files import cut_paragraphs
from luthier.data.tokenizer import encode_texts, load_tokenizer
from luthier.models.load import load_pretrained
from luthier.models.stream import LayerStream
from luthier.quantize.calibration import calibration
from luthier.quantize.compare import Comparison, compare
from luthier.quantize.config import QuantizeConfig
from luthier.quantize.methods import METHODS
from luthier.quantize.outliers import inject_outliers
from luthier.quantize.walk import quantize_layers
from luthier.quantize.weights import QuantizedWeight

TOUR = Path("runs/tour/01-pretrain")  # of `make run`, the default model and its text
# name in the table -> settings; `paper` has the published settings but for the number of windows, which the text limits
ARMS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "rotated-gptq": {"method": "rotated-gptq"},
    "quick": {"method": "paroquant"},
    "paper": {"method": "paroquant", "preset": "paper"},
}
PLAIN = ("rtn", "awq", "gptq")  # deterministic: one seed is enough


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed: its distance to the original, its cost and its size."""

    comparison: Comparison
    seconds: float
    bits: float
    metadata_bits: float


def documents_of(spec: str, tokenizer: Any, limit: int) -> list[list[int]]:
    """Token ids of pieces of about 8 kB, each after the token that opens a document."""
    pieces = [piece for document in open_text(spec, tokenizer).documents for piece in cut_paragraphs(document)]
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [[opening, *ids] for ids in encode_texts(tokenizer, pieces[:limit])]


def bits_per_weight(quantized: Mapping[str, QuantizedWeight]) -> tuple[float, float]:
    """Bits per weight of codes and grid, and of the transforms; matrices that share a transform count it once."""
    weights = grid = transform = 0.0
    seen = set[bytes]()
    for weight in quantized.values():
        weights += weight.codes.shape[0] * weight.in_features
        grid += weight.codes.numel() * weight.bits + weight.points.numel() * weight.bits + 16 * weight.steps.numel()
        key = b"".join(tensor.numpy().tobytes() for tensor in weight.transform())
        if key not in seen:
            seen.add(key)
            transform += 16 * sum(tensor.numel() for tensor in weight.transform())
    return grid / weights, transform / weights


def with_weights(model: PreTrainedModel, quantized: Mapping[str, QuantizedWeight]) -> PreTrainedModel:
    """A copy of the model that computes with the quantized weights, in fp32."""
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in quantized.items():
            damaged.get_submodule(name).weight.copy_(weight.dequantized())  # type: ignore[operator, union-attr]
    return damaged


def run_arm(folder: Path, model: PreTrainedModel, test: Sequence[Sequence[int]], config: QuantizeConfig) -> Outcome:
    """Quantize the folder's model and compare."""
    tokenizer = load_tokenizer(str(folder))
    windows = calibration(config.data, tokenizer, config)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        quantized = dict(
            quantize_layers(
                LayerStream.open(folder),
                windows,
                METHODS[config.method],
                config,
                Path(scratch),
                console=Console(as_json=True, err=open("/dev/null", "w")),  # noqa: SIM115
            )
        )
        seconds = time.perf_counter() - started
    comparison = compare(model, with_weights(model, quantized), test, context=config.sequence_length)
    return Outcome(comparison, seconds, *bits_per_weight(quantized))


def mean_kl(outcomes: Sequence[Outcome]) -> list[float]:
    """Divergence summed over each document, averaged over seeds."""
    return np.mean([outcome.comparison.document_kl for outcome in outcomes], 0).tolist()


def table(found: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """One row an arm: KL, ratios to rounding and to the better of AWQ and GPTQ, agreement, sizes, seconds."""
    plain = [name for name in ("awq", "gptq") if name in found]
    best = min(plain, key=lambda name: sum(mean_kl(found[name]))) if plain else None
    rows = []
    for name, outcomes in found.items():
        first = outcomes[0].comparison
        tokens = [float(count) for count in first.document_tokens]
        row: dict[str, Any] = {"method": name, "seeds": len(outcomes)}
        row["kl"] = bootstrap_ratio(mean_kl(outcomes), tokens).text(5)
        values = [outcome.comparison.kl.value for outcome in outcomes]
        row["kl_of_seeds"] = f"{min(values):.5f} to {max(values):.5f}"
        for label, other in (("vs_rtn", "rtn"), ("vs_best", best)):
            if other in found and other is not None:
                row[label] = bootstrap_ratio(mean_kl(outcomes), mean_kl(found[other])).text(3)
        row["agreement"] = first.agreement.text(4)
        row["loss_increase"] = first.loss_difference.text(4)
        row["bits"] = round(outcomes[0].bits, 3)
        row["transform_bits"] = round(outcomes[0].metadata_bits, 3)
        row["seconds"] = round(float(np.median([outcome.seconds for outcome in outcomes])), 1)
        rows.append(row)
    return rows


def settings(options: argparse.Namespace, arm: str, bits: int, seed: int) -> QuantizeConfig:
    """The arm's config for this benchmark's text and group size."""
    values = {
        "model": str(options.model),
        **ARMS[arm],
        "bits": bits,
        "group_size": options.group_size,
        "data": options.data,
        "samples": options.paper_samples if arm == "paper" else options.samples,
        "validation_samples": options.validation_samples,
        "sequence_length": options.length,
        "seed": seed,
        "device": "cpu",
        "precision": options.precision,
        "micro_batch_size": 8,
        **({"skip": tuple(options.skip)} if options.skip else {}),
    }
    config = build(QuantizeConfig, values)
    return replace(config, epochs=tuple(options.paper_epochs)) if arm == "paper" and options.paper_epochs else config


def main() -> None:
    """Run all arms at all widths and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOUR / "model")
    parser.add_argument("--data", default=str(TOUR / "data" / "train-0"), help="calibration text")
    parser.add_argument("--test", default=str(TOUR / "data" / "held-out"), help="other text, to compare on")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--paper-samples", type=int, default=512)
    parser.add_argument("--paper-epochs", type=int, nargs=2)
    parser.add_argument("--validation-samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=48, help="documents of the test text, of about 8 kB")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--outliers", type=float, default=0.0, help="first scale 3 %% of the channels by this factor")
    parser.add_argument("--skip", nargs="+", default=[], help="modules that stay as they are, as patterns")
    options = parser.parse_args()

    tokenizer, model = load_tokenizer(str(options.model)), load_pretrained(options.model, dtype=torch.float32)
    test = documents_of(options.test, tokenizer, options.pieces)
    with tempfile.TemporaryDirectory() as scratch:
        if options.outliers:
            inject_outliers(model, factor=options.outliers)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        folder = Path(scratch) if options.outliers else options.model
        for bits in options.bits:
            found = dict[str, list[Outcome]]()
            for arm in options.methods:
                for seed in options.seeds[:1] if arm in PLAIN else options.seeds:
                    outcome = run_arm(folder, model, test, settings(options, arm, bits, seed))
                    found.setdefault(arm, []).append(outcome)
                    print(
                        f"W{bits} {arm} seed {seed}: KL {outcome.comparison.kl.text(5)}, {outcome.seconds:.0f} s",
                        flush=True,
                    )
            name = options.model.resolve()
            record(
                "quantize_quality",
                model="/".join(name.parts[-2:]),
                bits=bits,
                outliers=options.outliers,
                skip=options.skip,
                group_size=options.group_size,
                samples=options.samples,
                paper_samples=options.paper_samples,
                length=options.length,
                documents=len(test),
                tokens=sum(map(len, test)) - len(test),
                rows=table(found),
            )


if __name__ == "__main__":
    main()
