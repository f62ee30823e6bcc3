"""Decoding speed on a CPU, batch 1, greedy, with random weights in the shape of Qwen3-0.6B; speed needs no others.

Contestants take turns in one process, so that a noisy machine disturbs all: bf16; plain int4 (the same kernel and
merged products, no rotation); ours with transforms shared among siblings, for K = 8 and 4; ours with one for each
matrix. With `--llama-python`, the Python of an environment that has llama-cpp-python and gguf, llama.cpp's Q4_0 and
Q4_K_M of the same shape take their turns too, in a process of their own.

    OMP_NUM_THREADS=2 python benchmarks/decode.py [--rounds 8] [--tokens 16] [--llama-python PATH]
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from luthier.core.stats import bootstrap_median
from luthier.quantize.kernels.dispatch import Runner
from luthier.quantize.linear import RotatedLinear
from luthier.quantize.pairs import round_robin_pairs
from luthier.quantize.sharing import prepare
from luthier.quantize.tensors import expected

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
GROUP, ROUNDS, PROMPT = 128, 8, 32
Decode = Callable[[int], float]


def dense_model() -> PreTrainedModel:
    """Qwen3-0.6B with random weights in bf16."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE, dtype=torch.bfloat16)).bfloat16()
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() == 2 else parameter.data.fill_(1)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are no weights
    return model


def quantized(model: PreTrainedModel, rounds: int, *, share: bool, head_bits: int = 16) -> PreTrainedModel:
    """A copy with random codes; embeddings, norms and head are the same tensors."""
    head = {id(p): p for name, p in model.named_parameters() if "_proj" not in name}
    modules = [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]
    linear: dict[int, Any] = {id(module.weight): nn.Parameter(torch.empty(0)) for _, module in modules}
    made = copy.deepcopy(model, {**head, **linear})
    for number, (name, module) in enumerate(list(made.named_modules())):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            shared = share and not name.endswith(("o_proj", "down_proj"))
            made.set_submodule(name, random_linear(module, rounds, 0 if shared else number))
    print(prepare(made, head_bits), flush=True)
    return made


def random_linear(module: nn.Linear, rounds: int, seed: int) -> RotatedLinear:
    """Random codes, steps and angles in the shape of a module; the transform depends on the seed only."""
    inputs, outputs = module.in_features, module.out_features
    new = RotatedLinear(inputs, outputs, False, bits=4, group_size=GROUP, rounds=rounds, dtype=torch.bfloat16)
    sizes = expected("", out_features=outputs, in_features=inputs, bits=4, group_size=GROUP, rounds=rounds)
    for name, (dtype, shape) in sizes.items():
        if dtype == torch.int32:
            new._buffers[name[1:]] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype)
    new.scales.uniform_(0.002, 0.004)
    new.channel_scales.fill_(1)
    if rounds:
        draw = torch.Generator().manual_seed(seed)
        new.theta.copy_(torch.randn(new.theta.shape, generator=draw) * 0.1)
        pairs, _ = round_robin_pairs(inputs, group_size=GROUP, rounds=rounds, seed=seed)
        new.pairs.copy_(torch.from_numpy(pairs))
    return new


def decoder(model: PreTrainedModel, read: Callable[[], None] = lambda: None) -> Decode:
    """Tokens per second of writing some tokens after a prompt; `read` is called when the prompt has been read."""

    @torch.no_grad()
    def decode(tokens: int) -> float:
        output = model(torch.arange(PROMPT)[None], use_cache=True, logits_to_keep=1)
        token, cache = output.logits[:, -1:].argmax(-1), output.cache
        read()
        began = time.perf_counter()
        for _ in range(tokens):
            token = model(token, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return tokens / (time.perf_counter() - began)

    return decode


@torch.no_grad()
def split(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Milliseconds a token in rotations, products, head and the rest, by clocks around the calls."""
    spent: dict[str, float] = defaultdict(float)

    def clocked(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            spent[part] += time.perf_counter() - began
            return result

        return wrapped

    kept = Runner.rotate, Runner.multiply, model.lm_head.forward
    Runner.rotate, Runner.multiply = clocked("rotation", kept[0]), clocked("product", kept[1])  # type: ignore[method-assign]
    model.lm_head.forward = clocked("head", kept[2])  # type: ignore[method-assign]
    decode = decoder(model, spent.clear)
    decode(1)
    rate = decode(tokens)
    Runner.rotate, Runner.multiply = kept[:2]  # type: ignore[method-assign]
    del model.lm_head.forward
    milliseconds = {part: 1000 * seconds / tokens for part, seconds in spent.items()}
    whole = 1000 / rate
    return {part: round(value, 2) for part, value in milliseconds.items()} | {
        "rest": round(whole - sum(milliseconds.values()), 2),
        "whole": round(whole, 2),
    }


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios with its bootstrap interval."""
    return bootstrap_median([a / b for a, b in zip(ours, theirs, strict=True)]).text(3)


class Llama:
    """llama.cpp in a process of its own, which decodes when told."""

    def __init__(self, python: str, folder: Path, kind: str, threads: int) -> None:
        script = str(Path(__file__).with_name("decode_llama.py"))
        command = [python, script, str(folder), kind, str(threads), str(PROMPT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{python} {script} failed; run it by hand: {' '.join(command)}")

    def __call__(self, tokens: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(tokens, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--llama-python", help="Python of an environment with llama-cpp-python and gguf")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # packing is many small calls, which crawl on busy cores with more threads
    dense = dense_model()
    models = {
        "bf16": dense,
        "int4": quantized(dense, 0, share=True),
        "ours": quantized(dense, ROUNDS, share=True),
        "ours, K = 4": quantized(dense, 4, share=True),
        "ours, not shared": quantized(dense, ROUNDS, share=False),
        "int4, 8-bit head": quantized(dense, 0, share=True, head_bits=8),
        "ours, 8-bit head": quantized(dense, ROUNDS, share=True, head_bits=8),
    }
    torch.set_num_threads(threads)
    contestants: dict[str, Decode] = {name: decoder(model) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        if options.llama_python:
            for kind in ("Q4_0", "Q4_K_M"):
                contestants[f"llama.cpp {kind}"] = Llama(options.llama_python, Path(folder), kind, threads)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds + 1):
            for name, decode in contestants.items():
                rate = decode(options.tokens)
                if number:  # the first round warms up
                    rates[name].append(rate)
        for decode in contestants.values():
            if isinstance(decode, Llama):
                decode.close()
    against = [("ours", name) for name in contestants if name != "ours"]
    against += [("int4", "bf16"), ("ours, not shared", "int4"), ("ours, K = 4", "int4"), ("ours, K = 4", "bf16")]
    against += [("ours, 8-bit head", name) for name in contestants if name.startswith(("bf16", "int4, ", "llama"))]
    record(
        "decode",
        shape="Qwen3-0.6B",
        threads=threads,
        rounds=options.rounds,
        tokens=options.tokens,
        tokens_per_second={name: bootstrap_median(measured).text(2) for name, measured in rates.items()},
        **{f"{a} / {b}": ratio(rates[a], rates[b]) for a, b in against},
        milliseconds_of_a_token={name: split(model, options.tokens) for name, model in models.items()},
    )


if __name__ == "__main__":
    main()
