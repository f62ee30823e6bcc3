"""AutoRound on the same windows, for `quantize_quality.py`; runs in an environment of its own that has auto-round.

    PYTHON benchmarks/peer_autoround.py MODEL WINDOWS.npy BITS GROUP_SIZE OUT

Writes the model with its weights rounded (format "fake"), and prints the seconds that it took.
"""

import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

with contextlib.suppress(ImportError):
    import luthier  # noqa: F401  # where it is installed too, so that Instella can be loaded


def main() -> None:
    """Quantize with the package's own defaults, asymmetric as the others are."""
    folder, windows, bits, group_size, out = sys.argv[1:]
    ids = torch.from_numpy(np.load(windows))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=int(bits),
        group_size=int(group_size),
        sym=False,
        dataset=[{"input_ids": row[None]} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    )
    started = time.perf_counter()
    quantizer.quantize()
    print(f"seconds {time.perf_counter() - started:.1f}")
    quantizer.save_quantized(out, format="fake")
    if not any(Path(out).glob("*.safetensors")):
        raise SystemExit(f"{out}: nothing was written")


if __name__ == "__main__":
    main()
